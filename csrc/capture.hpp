// Activations of one decode, pooled as they pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.hpp"

namespace pysteer {

enum class Pooling { last, mean, all };

// All memory is taken in the constructor; put() is called from the graph callback and only writes.
class Capture {
  public:
    // Captures rows [start, stop) of a decode of n_tokens tokens at every (site, layer) marked in `wanted`
    // (n_sites x n_layer flags). Throws std::invalid_argument for an empty or impossible range.
    Capture(std::size_t n_layer, std::size_t n_embd, std::vector<uint8_t> wanted, Pooling pooling, int64_t n_tokens,
            int64_t start, int64_t stop);

    bool wants(Site site, std::size_t layer) const noexcept { return slot(site, layer) >= 0; }
    // Takes row number `token` of the decode.
    void put(Site site, std::size_t layer, int64_t token, const float * row) noexcept;

    // Writes what was captured at a site and layer: n_embd floats for last and mean, (stop - start) x n_embd for all.
    // Throws std::runtime_error if not every token's row was seen.
    void read(Site site, std::size_t layer, float * out) const;

    std::size_t rows_out() const noexcept;
    std::size_t n_embd() const noexcept { return n_embd_; }

  private:
    int32_t slot(Site site, std::size_t layer) const noexcept {
        return slots_[static_cast<std::size_t>(site) * n_layer_ + layer];
    }

    std::size_t n_layer_;
    std::size_t n_embd_;
    Pooling pooling_;
    int64_t start_;
    int64_t stop_;
    std::vector<int32_t> slots_;
    std::vector<float> rows_;   // last, all
    std::vector<double> sums_;  // mean
    std::vector<int64_t> seen_;
};

}  // namespace pysteer
