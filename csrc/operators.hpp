// The operators: changes of one row of activations by directions. Floats in, floats out; no knowledge of llama.cpp.
//
// h is the row, s the strength, d a direction, e a unit direction. Every operator equals the formula beside it to
// float32 rounding; dot products are summed in double precision.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pysteer {

enum class OperatorKind : int32_t {
    add,       // h + s d
    ablate,    // h - s (h.e) e; one_sided: only where h.e > 0
    clamp,     // h + s (clip(h.e, low, high) - h.e) e
    rotate,    // turns h's part in the plane of e1 and e2 by s a; target: to s a, from e1; a: angle. Keeps the norm
    low_rank,  // h + s U (V^T h): the rows are the columns of U, then those of V
};

struct Operator {
    OperatorKind kind = OperatorKind::add;
    bool keep_norm = false;  // scale the row to its former norm afterwards
    bool one_sided = false;
    bool target = false;
    float low = 0.0f;
    float high = 0.0f;
    float angle = 0.0f;  // radians

    // Additions can be summed before they are applied, unless they keep the norm.
    bool sums() const noexcept { return kind == OperatorKind::add && !keep_norm; }
};

// row += direction, in the precision of ggml's own ADD on float32: the result is bit-identical to llama.cpp's control
// vector.
inline void add(float * row, const float * direction, std::size_t width) noexcept {
    for (std::size_t i = 0; i < width; ++i) {
        row[i] += direction[i];
    }
}

// sum = strength direction, or sum + strength direction.
inline void add_scaled(float * sum, bool first, float strength, const float * direction, std::size_t width) noexcept {
    if (first) {
        for (std::size_t i = 0; i < width; ++i) {
            sum[i] = strength * direction[i];
        }
        return;
    }
    for (std::size_t i = 0; i < width; ++i) {
        sum[i] += strength * direction[i];
    }
}

// sums += row in double precision, for means over many tokens.
inline void accumulate(double * sums, const float * row, std::size_t width) noexcept {
    for (std::size_t i = 0; i < width; ++i) {
        sums[i] += static_cast<double>(row[i]);
    }
}

// The largest absolute value; infinity or NaN if the values contain any.
float largest(const float * values, std::size_t count) noexcept;

// True if a token can be drawn from logits: none is NaN or +infinity, and at least one is finite.
bool usable_logits(const float * logits, std::size_t count) noexcept;

// The inner product of the changes that two operators make at strength 1: of the directions for add, and (Frobenius) of
// the matrices that are multiplied with h for low_rank and, to first order in the angle, for rotate. 0 for operators of
// different kinds, and for ablate, clamp and rotations to a target: strength 1 reaches the goal of these, and a second
// one does not go beyond. Rows as for apply().
double likeness(const Operator & a, const float * rows_a, std::size_t n_rows_a, const Operator & b,
                const float * rows_b, std::size_t n_rows_b, std::size_t width) noexcept;

// Applies an operator to h. `rows` holds n_rows rows of `width` values: unit rows for ablate and clamp, two orthonormal
// rows for rotate. `scratch` has room for n_rows values.
void apply(const Operator & op, const float * rows, std::size_t n_rows, float strength, float * h, std::size_t width,
           double * scratch) noexcept;

}  // namespace pysteer
