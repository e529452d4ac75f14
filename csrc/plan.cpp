#include "plan.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

namespace pysteer {
namespace {

constexpr uint32_t exponent_mask = 0x7f800000u;  // all set in a float32 that is infinite or NaN

}  // namespace

const char * site_name(Site site) noexcept {
    return site == Site::residual ? "residual" : "attention";
}

Plan::Plan(std::size_t n_layer, std::size_t n_embd) : n_layer_(n_layer), n_embd_(n_embd) {
    for (auto & rows : rows_) {
        rows.resize(n_layer);
    }
}

void Plan::add(Site site, const int32_t * layers, std::size_t n_layers, const float * directions, float strength) {
    const auto index = static_cast<std::size_t>(site);
    for (std::size_t k = 0; k < n_layers; ++k) {
        if (layers[k] < 0 || static_cast<std::size_t>(layers[k]) >= n_layer_) {
            throw std::invalid_argument("layer " + std::to_string(layers[k]) + " is not one of the model's " +
                                        std::to_string(n_layer_) + " layers");
        }
        auto & row = rows_[index][static_cast<std::size_t>(layers[k])];
        const bool first = row == nullptr;
        if (first) {
            row.reset(new float[n_embd_]);  // not zeroed: written just below
        }
        float * target = row.get();
        const float * source = directions + k * n_embd_;
        uint32_t not_finite = 0;  // a flag and no early exit, so that the loop can run on vectors
        for (std::size_t i = 0; i < n_embd_; ++i) {
            target[i] = (first ? 0.0f : target[i]) + strength * source[i];
            uint32_t bits = 0;
            std::memcpy(&bits, &target[i], sizeof bits);
            not_finite |= static_cast<uint32_t>((bits & exponent_mask) == exponent_mask);
        }
        if (not_finite != 0) {
            throw std::invalid_argument("the direction of layer " + std::to_string(layers[k]) +
                                        " times its strength is not finite");
        }
    }
    used_[index] = used_[index] || n_layers > 0;
}

bool Plan::fits_resident() const noexcept {
    return !uses(Site::attention) && rows_[0][0] == nullptr;
}

}  // namespace pysteer
