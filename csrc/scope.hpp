// The factor of the strength for each token of a sequence.
//
// p is the token's position from 0, n the number of prompt tokens, and r = p - (n - 1) the response index: the row of
// the last prompt token (r = 0) produces the first response token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pysteer {

struct Scope {
    enum class Kind : int32_t {
        all,
        positions,  // start <= p < stop
        response,   // start <= r < stop
        linear,     // 0 <= r < stop: 1 - r / stop
        cosine,     // 0 <= r < stop: (1 + cos(pi r / stop)) / 2
        values,     // 0 <= r < size: values[r]
    };
    Kind kind = Kind::all;
    int64_t start = 0;
    int64_t stop = 0;
    std::vector<float> values;

    // 0 where the scope leaves the token alone.
    float factor(int64_t p, int64_t n) const noexcept;
};

}  // namespace pysteer
