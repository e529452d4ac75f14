// Activations of a decode, averaged as they pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.hpp"

namespace pysteer {

// All memory is taken in the constructor; put() is called from the graph callback and only writes.
class Capture {
  public:
    // Token i of the decode counts towards the mean number slots[i] of n_slots, or, where that is -1, towards none. One
    // token a slot keeps each token's row; one slot for a range gives the range's mean; slots may belong to different
    // sequences. Captured are the (site, layer) marked in `wanted` (n_sites x n_layer flags). Throws
    // std::invalid_argument for a slot that does not exist or has no token.
    Capture(std::size_t n_layer, std::size_t n_embd, std::vector<uint8_t> wanted, std::vector<int32_t> slots,
            std::size_t n_slots);

    bool wants(Place place) const noexcept { return index(place) >= 0; }
    // Whether no wanted site comes after this one in the graph.
    bool ends_at(Place place) const noexcept { return place == last_; }
    // Takes row number `token` of the decode.
    void put(Place place, int64_t token, const float * row) noexcept;

    // Writes the means of a site and layer, n_slots x n_embd. Throws std::runtime_error if not every token's row was
    // seen.
    void read(Place place, float * out) const;

    std::size_t n_slots() const noexcept { return expected_.size(); }
    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }

  private:
    int32_t index(Place place) const noexcept { return indices_[place_index(place, n_layer_)]; }

    std::size_t n_layer_;
    std::size_t n_embd_;
    std::vector<int32_t> indices_;  // per site and layer: its place in sums_, or -1
    std::vector<int32_t> slots_;
    std::vector<int64_t> expected_;  // tokens per slot
    std::vector<double> sums_;       // per index and slot
    std::vector<int64_t> seen_;      // the same
    Place last_;                     // in the order of the graph
};

}  // namespace pysteer
