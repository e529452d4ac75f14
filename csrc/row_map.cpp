#include "row_map.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pysteer {

void RowMap::resize(std::size_t n_layer) {
    n_layer_ = n_layer;
    required_.assign(n_sites * n_layer, 0);
    passed_.assign(n_sites * n_layer, 0);
    reached_.assign(n_sites * n_layer, 0);
}

void RowMap::begin(const Batch & batch, const std::vector<uint8_t> & required) {
    batch_ = &batch;
    required_ = required;
    std::fill(passed_.begin(), passed_.end(), 0);
    std::fill(reached_.begin(), reached_.end(), 0);
    tokens_passed_ = 0;
}

void RowMap::pass(Place place, int64_t n_rows) noexcept {
    int64_t & passed = passed_[place_index(place, n_layer_)];
    passed += n_rows;
    if (place.layer + 1 < n_layer_) {
        tokens_passed_ = std::max(tokens_passed_, passed);
    }
}

void RowMap::reach(Place place, int64_t n_rows) noexcept {
    reached_[place_index(place, n_layer_)] += n_rows;
}

std::optional<RowIndices> RowMap::rows_of(Place place, int64_t node_rows) const noexcept {
    const int64_t end = passed_[place_index(place, n_layer_)];
    const int64_t first = end - node_rows;
    if (first < 0) {
        return std::nullopt;
    }
    if (!keeps_every_row(place, n_layer_) && n_outputs() < n_rows()) {
        const std::vector<int32_t> & outputs = batch_->output_rows();
        const bool only_outputs = n_layer_ == 1 ? end <= n_outputs() : end == outputs_passed();
        if (only_outputs) {
            return RowIndices(outputs.data() + first, first);
        }
        if (n_layer_ == 1 || end != tokens_passed_) {
            return std::nullopt;
        }
    }
    return end <= n_rows() ? std::optional(RowIndices(nullptr, first)) : std::nullopt;
}

// The rows with logits among the rows computed in the blocks before the last.
int64_t RowMap::outputs_passed() const noexcept {
    const std::vector<int32_t> & outputs = batch_->output_rows();
    return std::lower_bound(outputs.begin(), outputs.end(), static_cast<int32_t>(tokens_passed_)) - outputs.begin();
}

void RowMap::require_all_reached() const {
    for (std::size_t at = 0; at < required_.size(); ++at) {
        if (required_[at] == 0) {
            continue;
        }
        const Place place = place_at(at, n_layer_);
        const int64_t expected = keeps_every_row(place, n_layer_) ? n_rows() : n_outputs();
        if (reached_[at] < expected) {
            throw std::runtime_error("steering reached " + std::to_string(reached_[at]) + " of " +
                                     std::to_string(expected) + " tokens at " + place_name(place));
        }
    }
}

}  // namespace pysteer
