// What one row of activations undergoes. Floats in, floats out; no knowledge of llama.cpp.
#pragma once

#include <cstddef>

namespace pysteer {

// row += direction, element by element, in the order and precision of ggml's own ADD on float32, so that the result is
// bit-identical to llama.cpp's control vector.
inline void add(float * row, const float * direction, std::size_t width) noexcept {
    for (std::size_t i = 0; i < width; ++i) {
        row[i] += direction[i];
    }
}

// sums += row in double precision, for means over many tokens.
inline void accumulate(double * sums, const float * row, std::size_t width) noexcept {
    for (std::size_t i = 0; i < width; ++i) {
        sums[i] += static_cast<double>(row[i]);
    }
}

}  // namespace pysteer
