#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace pysteer {

const char * site_name(Site site) noexcept {
    constexpr std::array<const char *, n_sites> names = {"residual", "attention", "mlp"};
    return names[static_cast<std::size_t>(site)];
}

Plan::Plan(std::size_t n_layer, std::size_t n_embd) : n_layer_(n_layer), n_embd_(n_embd), acts_(n_sites * n_layer) {}

void Plan::add(Site site, const int32_t * layers, std::size_t n_layers, const float * directions, float strength) {
    for (std::size_t k = 0; k < n_layers; ++k) {
        if (layers[k] < 0 || static_cast<std::size_t>(layers[k]) >= n_layer_) {
            throw std::invalid_argument("layer " + std::to_string(layers[k]) + " is not one of the model's " +
                                        std::to_string(n_layer_) + " layers");
        }
        const std::size_t at = place(site, static_cast<std::size_t>(layers[k]));
        terms_.push_back({at, directions + k * n_embd_, strength});
        acts_[at] = 1;
    }
    used_[static_cast<std::size_t>(site)] = uses(site) || n_layers > 0;
}

void Plan::sum(Site site, std::size_t layer, float * out) const noexcept {
    const std::size_t at = place(site, layer);
    bool first = true;
    for (const Term & term : terms_) {
        if (term.place != at) {
            continue;
        }
        for (std::size_t i = 0; i < n_embd_; ++i) {
            out[i] = (first ? 0.0f : out[i]) + term.strength * term.row[i];
        }
        first = false;
    }
    if (first) {
        std::fill(out, out + n_embd_, 0.0f);
    }
}

void Plan::check_finite() const {
    std::vector<float> row(n_embd_);
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            sum(site, layer, row.data());
            if (!std::all_of(row.begin(), row.end(), [](float value) { return std::isfinite(value); })) {
                throw std::invalid_argument("the direction of layer " + std::to_string(layer) +
                                            " times its strength is not finite");
            }
        }
    }
}

void Plan::keep_sums() {
    sums_.resize(n_sites * n_layer_);
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            if (acts(site, layer)) {
                auto & row = sums_[place(site, layer)];
                row.reset(new float[n_embd_]);  // not zeroed: written just below
                sum(site, layer, row.get());
            }
        }
    }
}

bool Plan::fits_resident() const noexcept {
    return !uses(Site::attention) && !uses(Site::mlp) && acts_[0] == 0;
}

}  // namespace pysteer
