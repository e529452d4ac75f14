// What one row of activations undergoes. Floats in, floats out; no knowledge of llama.cpp.
//
// h is the row, s the strength, d the directions as they come, e unit directions. Every operator equals the formula
// beside it to float32 rounding; sums are taken in double precision.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pysteer {

enum class OperatorKind : int32_t {
    add,       // h + s d
    ablate,    // h - s (h.e) e; one_sided: only where h.e > 0
    clamp,     // h + s (clip(h.e, low, high) - h.e) e
    rotate,    // turns h's part in the plane of e1 and e2 by s angle; target: to s angle. Keeps the norm
    low_rank,  // h + s U (V^T h): the rows are the columns of U, then those of V
};

struct Operator {
    OperatorKind kind = OperatorKind::add;
    bool keep_norm = false;  // afterwards the row is scaled to the norm it had
    bool one_sided = false;
    bool target = false;
    float low = 0.0f;
    float high = 0.0f;
    float angle = 0.0f;  // radians

    // Additions without a norm to keep can be summed before they are applied.
    bool sums() const noexcept { return kind == OperatorKind::add && !keep_norm; }
};

// row += direction, element by element, in the order and precision of ggml's own ADD on float32, so that the result is
// bit-identical to llama.cpp's control vector.
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

// The largest absolute value; infinity or NaN if any value is.
float largest(const float * values, std::size_t count) noexcept;

// Applies any operator to h. `rows` holds n_rows rows of `width` values: unit rows for ablate and clamp, two
// orthonormal ones for rotate. `scratch` has room for n_rows values.
void apply(const Operator & op, const float * rows, std::size_t n_rows, float strength, float * h, std::size_t width,
           double * scratch) noexcept;

}  // namespace pysteer
