#include "operators.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pysteer {
namespace {

// Takes several partial sums, which the compiler can keep in vector registers.
double dot(const float * a, const float * b, std::size_t width) noexcept {
    constexpr std::size_t lanes = 8;
    std::array<double, lanes> sums{};
    std::size_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        for (std::size_t k = 0; k < lanes; ++k) {
            sums[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
        }
    }
    double sum = 0.0;
    for (; i < width; ++i) {
        sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    for (const double part : sums) {
        sum += part;
    }
    return sum;
}

void add_multiple(float * h, double factor, const float * direction, std::size_t width) noexcept {
    const auto scale = static_cast<float>(factor);
    for (std::size_t i = 0; i < width; ++i) {
        h[i] += scale * direction[i];
    }
}

void rotate(const Operator & op, const float * rows, float strength, float * h, std::size_t width) noexcept {
    const float * first = rows;
    const float * second = rows + width;
    const double x = dot(h, first, width);
    const double y = dot(h, second, width);
    const double angle = static_cast<double>(strength) * static_cast<double>(op.angle);
    double new_x = std::cos(angle) * x - std::sin(angle) * y;
    double new_y = std::sin(angle) * x + std::cos(angle) * y;
    if (op.target) {
        const double length = std::hypot(x, y);
        new_x = std::cos(angle) * length;
        new_y = std::sin(angle) * length;
    }
    add_multiple(h, new_x - x, first, width);
    add_multiple(h, new_y - y, second, width);
}

}  // namespace

float largest(const float * values, std::size_t count) noexcept {
    // Without the sign, the bits of floats have the order of the values, infinity and NaN last; and compilers vectorise
    // a maximum of integers.
    int32_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
        int32_t bits = 0;
        std::memcpy(&bits, values + i, sizeof bits);
        most = std::max(most, bits & 0x7fffffff);
    }
    float found = 0.0f;
    std::memcpy(&found, &most, sizeof found);
    return found;
}

bool usable_logits(const float * logits, std::size_t count) noexcept {
    // Comparisons of bits, which compilers vectorise: +infinity is the last of the positive numbers, and without the
    // sign NaN comes after infinity.
    constexpr int32_t infinity = 0x7f800000;
    int32_t bad = 0;
    for (std::size_t i = 0; i < count; ++i) {
        int32_t bits = 0;
        std::memcpy(&bits, logits + i, sizeof bits);
        bad |= (bits >= infinity ? 1 : 0) | ((bits & 0x7fffffff) > infinity ? 1 : 0);
    }
    return bad == 0 && std::any_of(logits, logits + count, [](float value) { return std::isfinite(value); });
}

double likeness(const Operator & a, const float * rows_a, std::size_t n_rows_a, const Operator & b,
                const float * rows_b, std::size_t n_rows_b, std::size_t width) noexcept {
    if (a.kind != b.kind || a.target || b.target) {
        return 0.0;
    }
    const auto product = [&](std::size_t i, std::size_t j) {
        return dot(rows_a + i * width, rows_b + j * width, width);
    };
    if (a.kind == OperatorKind::add) {
        return product(0, 0);
    }
    if (a.kind == OperatorKind::rotate) {  // h changes by angle (e2 e1^T - e1 e2^T) h
        return 2.0 * static_cast<double>(a.angle) * static_cast<double>(b.angle) *
               (product(0, 0) * product(1, 1) - product(0, 1) * product(1, 0));
    }
    double sum = 0.0;
    if (a.kind == OperatorKind::low_rank) {
        for (std::size_t i = 0; i < n_rows_a / 2; ++i) {
            for (std::size_t j = 0; j < n_rows_b / 2; ++j) {
                sum += product(i, j) * product(n_rows_a / 2 + i, n_rows_b / 2 + j);
            }
        }
    }
    return sum;
}

void apply(const Operator & op, const float * rows, std::size_t n_rows, float strength, float * h, std::size_t width,
           double * scratch) noexcept {
    const double norm = op.keep_norm ? std::sqrt(dot(h, h, width)) : 0.0;
    switch (op.kind) {
        case OperatorKind::add:
            add_multiple(h, static_cast<double>(strength), rows, width);
            break;
        case OperatorKind::ablate: {
            const double part = dot(h, rows, width);
            if (!op.one_sided || part > 0.0) {
                add_multiple(h, -static_cast<double>(strength) * part, rows, width);
            }
            break;
        }
        case OperatorKind::clamp: {
            const double part = dot(h, rows, width);
            const double wanted = std::clamp(part, static_cast<double>(op.low), static_cast<double>(op.high));
            add_multiple(h, static_cast<double>(strength) * (wanted - part), rows, width);
            break;
        }
        case OperatorKind::rotate:
            rotate(op, rows, strength, h, width);
            break;
        case OperatorKind::low_rank: {
            const std::size_t rank = n_rows / 2;
            for (std::size_t k = 0; k < rank; ++k) {  // all of V^T h before h changes
                scratch[k] = static_cast<double>(strength) * dot(h, rows + (rank + k) * width, width);
            }
            for (std::size_t k = 0; k < rank; ++k) {
                add_multiple(h, scratch[k], rows + k * width, width);
            }
            break;
        }
    }
    if (op.keep_norm) {
        const double now = std::sqrt(dot(h, h, width));
        if (now > 0.0) {
            const auto scale = static_cast<float>(norm / now);
            for (std::size_t i = 0; i < width; ++i) {
                h[i] *= scale;
            }
        }
    }
}

}  // namespace pysteer
