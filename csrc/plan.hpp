// What is added at which site and layer. Immutable once finished, so that a running decode can share it without locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pysteer {

enum class Site : std::size_t { residual = 0, attention = 1, mlp = 2 };
inline constexpr std::size_t n_sites = 3;
inline constexpr std::array<Site, n_sites> all_sites = {Site::residual, Site::attention, Site::mlp};

const char * site_name(Site site) noexcept;

class Plan {
  public:
    Plan(std::size_t n_layer, std::size_t n_embd);

    // Adds `strength * directions[k]` to what the plan does at layers[k]; directions is row-major, n_layers x n_embd,
    // and must live as long as the plan is compiled or made resident from. Throws std::invalid_argument for a layer out
    // of range.
    void add(Site site, const int32_t * layers, std::size_t n_layers, const float * directions, float strength);

    // Throws std::invalid_argument if a sum is not finite.
    void check_finite() const;
    // Keeps the sums, which the hooked way adds to every row. The resident way writes each once and does without: a
    // change of steering between two tokens then touches no memory but the vectors' and the tensors'.
    void keep_sums();

    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }

    bool acts(Site site, std::size_t layer) const noexcept { return acts_[place(site, layer)] != 0; }
    bool uses(Site site) const noexcept { return used_[static_cast<std::size_t>(site)]; }
    bool empty() const noexcept { return terms_.empty(); }

    // Writes what is added there, n_embd values; zeros where the plan does not act.
    void sum(Site site, std::size_t layer, float * out) const noexcept;
    // The same, kept by keep_sums(); null where the plan does not act or kept nothing.
    const float * direction(Site site, std::size_t layer) const noexcept {
        return sums_.empty() ? nullptr : sums_[place(site, layer)].get();
    }

    // Whether llama.cpp's own control-vector tensors can express it: the residual of layers >= 1 and nothing else.
    bool fits_resident() const noexcept;
    // Whether it can be hooked: keep_sums() was called.
    bool fits_hooked() const noexcept { return !sums_.empty(); }

  private:
    struct Term {
        std::size_t place;
        const float * row;
        float strength;
    };
    std::size_t place(Site site, std::size_t layer) const noexcept {
        return static_cast<std::size_t>(site) * n_layer_ + layer;
    }

    std::size_t n_layer_;
    std::size_t n_embd_;
    std::vector<Term> terms_;    // in the order of addition
    std::vector<uint8_t> acts_;  // per place
    std::array<bool, n_sites> used_{};
    std::vector<std::unique_ptr<float[]>> sums_;  // per place; none before keep_sums()
};

}  // namespace pysteer
