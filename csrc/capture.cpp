#include "capture.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "operators.hpp"

namespace pysteer {

Capture::Capture(std::size_t n_layer, std::size_t n_embd, std::vector<uint8_t> wanted, Pooling pooling,
                 int64_t n_tokens, int64_t start, int64_t stop)
    : n_layer_(n_layer), n_embd_(n_embd), pooling_(pooling), start_(start), stop_(stop) {
    if (start < 0 || stop > n_tokens || start >= stop) {
        throw std::invalid_argument("the token range [" + std::to_string(start) + ", " + std::to_string(stop) +
                                    ") is empty or outside the " + std::to_string(n_tokens) + " tokens given");
    }
    if (wanted.size() != n_sites * n_layer) {
        throw std::invalid_argument("one flag per site and layer expected");
    }
    std::size_t count = 0;
    slots_.reserve(wanted.size());
    for (const uint8_t flag : wanted) {
        slots_.push_back(flag != 0 ? static_cast<int32_t>(count++) : -1);
    }
    if (pooling == Pooling::mean) {
        sums_.assign(count * n_embd, 0.0);
    } else {
        rows_.assign(count * rows_out() * n_embd, 0.0f);
    }
    seen_.assign(count, 0);
}

std::size_t Capture::rows_out() const noexcept {
    return pooling_ == Pooling::all ? static_cast<std::size_t>(stop_ - start_) : 1;
}

void Capture::put(Site site, std::size_t layer, int64_t token, const float * row) noexcept {
    const int32_t index = slot(site, layer);
    if (index < 0 || token < start_ || token >= stop_) {
        return;
    }
    const auto at = static_cast<std::size_t>(index);
    ++seen_[at];
    switch (pooling_) {
        case Pooling::mean:
            accumulate(sums_.data() + at * n_embd_, row, n_embd_);
            break;
        case Pooling::last:
            if (token == stop_ - 1) {
                std::memcpy(rows_.data() + at * n_embd_, row, n_embd_ * sizeof(float));
            }
            break;
        case Pooling::all:
            std::memcpy(rows_.data() + (at * rows_out() + static_cast<std::size_t>(token - start_)) * n_embd_, row,
                        n_embd_ * sizeof(float));
            break;
    }
}

void Capture::read(Site site, std::size_t layer, float * out) const {
    const int32_t index = slot(site, layer);
    if (index < 0) {
        throw std::runtime_error("nothing was captured at layer " + std::to_string(layer));
    }
    const auto at = static_cast<std::size_t>(index);
    if (seen_[at] != stop_ - start_) {
        throw std::runtime_error("saw " + std::to_string(seen_[at]) + " of " + std::to_string(stop_ - start_) +
                                 " rows at site " + site_name(site) + ", layer " + std::to_string(layer));
    }
    if (pooling_ == Pooling::mean) {
        const double scale = 1.0 / static_cast<double>(stop_ - start_);
        for (std::size_t i = 0; i < n_embd_; ++i) {
            out[i] = static_cast<float>(sums_[at * n_embd_ + i] * scale);
        }
    } else {
        const std::size_t size = rows_out() * n_embd_;
        std::memcpy(out, rows_.data() + at * size, size * sizeof(float));
    }
}

}  // namespace pysteer
