#include "capture.hpp"

#include <stdexcept>
#include <string>

#include "operators.hpp"

namespace pysteer {

Capture::Capture(std::size_t n_layer, std::size_t n_embd, std::vector<uint8_t> wanted, std::vector<int32_t> slots,
                 std::size_t n_slots)
    : n_layer_(n_layer), n_embd_(n_embd), slots_(std::move(slots)) {
    if (wanted.size() != n_sites * n_layer) {
        throw std::invalid_argument("expected " + std::to_string(n_sites * n_layer) +
                                    " flags of wanted places, found " + std::to_string(wanted.size()));
    }
    expected_.assign(n_slots, 0);
    for (const int32_t slot : slots_) {
        if (slot >= 0 && static_cast<std::size_t>(slot) >= n_slots) {
            throw std::invalid_argument("expected slots below " + std::to_string(n_slots) + ", found " +
                                        std::to_string(slot));
        }
        if (slot >= 0) {
            ++expected_[static_cast<std::size_t>(slot)];
        }
    }
    for (const int64_t tokens : expected_) {
        if (tokens == 0) {
            throw std::invalid_argument("every slot needs a token: a mean of no rows is undefined");
        }
    }
    std::size_t count = 0;
    indices_.assign(wanted.size(), -1);
    for (std::size_t layer = 0; layer < n_layer; ++layer) {
        for (const Site site : {Site::attention, Site::mlp, Site::residual}) {  // as the graph computes them
            const std::size_t at = place_index({site, layer}, n_layer);
            if (wanted[at] != 0) {
                indices_[at] = static_cast<int32_t>(count++);
                last_ = {site, layer};
            }
        }
    }
    sums_.assign(count * n_slots * n_embd, 0.0);
    seen_.assign(count * n_slots, 0);
}

void Capture::put(Place place, std::size_t token, const float * row) noexcept {
    const int32_t at = index(place);
    if (at < 0 || !takes(token)) {
        return;
    }
    const std::size_t mean = static_cast<std::size_t>(at) * n_slots() + static_cast<std::size_t>(slots_[token]);
    ++seen_[mean];
    accumulate(sums_.data() + mean * n_embd_, row, n_embd_);
}

void Capture::read(Place place, float * out) const {
    const int32_t at = place.layer < n_layer_ ? index(place) : -1;
    if (at < 0) {
        throw std::runtime_error("nothing was captured at " + place_name(place));
    }
    for (std::size_t slot = 0; slot < n_slots(); ++slot) {
        const std::size_t mean = static_cast<std::size_t>(at) * n_slots() + slot;
        if (seen_[mean] != expected_[slot]) {
            throw std::runtime_error("captured " + std::to_string(seen_[mean]) + " of " +
                                     std::to_string(expected_[slot]) + " rows at " + place_name(place));
        }
        const double scale = 1.0 / static_cast<double>(expected_[slot]);
        for (std::size_t i = 0; i < n_embd_; ++i) {
            out[slot * n_embd_ + i] = static_cast<float>(sums_[mean * n_embd_ + i] * scale);
        }
    }
}

}  // namespace pysteer
