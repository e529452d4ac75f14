// Means of the activations of a decode, summed as rows pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.hpp"

namespace pysteer {

// The constructor takes all memory; put(), which the callback calls, only writes.
class Capture {
  public:
    // Token i of the decode counts towards mean slots[i] of n_slots; -1: towards no mean. One token a slot keeps each
    // token's row; one slot for a range gives the mean of the range; slots may belong to different sequences. `wanted`
    // flags the places to capture by place_index(). Throws std::invalid_argument for a slot out of range or without
    // tokens.
    Capture(std::size_t n_layer, std::size_t n_embd, std::vector<uint8_t> wanted, std::vector<int32_t> slots,
            std::size_t n_slots);

    bool wants(Place place) const noexcept { return index(place) >= 0; }
    // True if the place is the last wanted place in the order of the graph.
    bool ends_at(Place place) const noexcept { return place == last_; }
    // True if the decode's token number `token` counts towards a mean.
    bool takes(std::size_t token) const noexcept { return token < slots_.size() && slots_[token] >= 0; }
    // Adds the row of the decode's token number `token`.
    void put(Place place, std::size_t token, const float * row) noexcept;

    // Writes the means of a place, n_slots x n_embd. Throws std::runtime_error if the place is not wanted, or the
    // row of some token is missing.
    void read(Place place, float * out) const;

    std::size_t n_slots() const noexcept { return expected_.size(); }
    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }

  private:
    int32_t index(Place place) const noexcept { return indices_[place_index(place, n_layer_)]; }

    std::size_t n_layer_;
    std::size_t n_embd_;
    std::vector<int32_t> indices_;   // by place: index into sums_; -1: not wanted
    std::vector<int32_t> slots_;     // by token
    std::vector<int64_t> expected_;  // tokens by slot
    std::vector<double> sums_;       // by index and slot, n_embd values each
    std::vector<int64_t> seen_;      // rows by index and slot
    Place last_;                     // in the order of the graph
};

}  // namespace pysteer
