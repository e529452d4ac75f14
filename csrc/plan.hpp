// What is added at which site and layer. Immutable once built, so that a running decode can share it without locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pysteer {

enum class Site : std::size_t { residual = 0, attention = 1 };
inline constexpr std::size_t n_sites = 2;

const char * site_name(Site site) noexcept;

class Plan {
  public:
    Plan(std::size_t n_layer, std::size_t n_embd);

    // Adds `strength * directions[k]` to what the plan does at layers[k]; directions is row-major, n_layers x n_embd.
    // Throws std::invalid_argument for a layer out of range and for values that are not finite. Only while building.
    void add(Site site, const int32_t * layers, std::size_t n_layers, const float * directions, float strength);

    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }

    // The direction added there, or null.
    const float * direction(Site site, std::size_t layer) const noexcept {
        return rows_[static_cast<std::size_t>(site)][layer].get();
    }
    bool uses(Site site) const noexcept { return used_[static_cast<std::size_t>(site)]; }
    bool empty() const noexcept { return !uses(Site::residual) && !uses(Site::attention); }

    // Whether llama.cpp's own control-vector tensors can express it: the residual of layers >= 1 and nothing else.
    bool fits_resident() const noexcept;

  private:
    std::size_t n_layer_;
    std::size_t n_embd_;
    // A block a row: a change of steering between two tokens then reuses the blocks of the plan before it.
    std::array<std::vector<std::unique_ptr<float[]>>, n_sites> rows_;
    std::array<bool, n_sites> used_{};
};

}  // namespace pysteer
