// Where in a block something happens.
#pragma once

#include <array>
#include <cstddef>

namespace pysteer {

enum class Site : std::size_t { residual = 0, attention = 1, mlp = 2 };
inline constexpr std::size_t n_sites = 3;
inline constexpr std::array<Site, n_sites> all_sites = {Site::residual, Site::attention, Site::mlp};

inline const char * site_name(Site site) noexcept {
    constexpr std::array<const char *, n_sites> names = {"residual", "attention", "mlp"};
    return names[static_cast<std::size_t>(site)];
}

// A site and layer as one index below n_sites * n_layer.
inline std::size_t place_of(Site site, std::size_t layer, std::size_t n_layer) noexcept {
    return static_cast<std::size_t>(site) * n_layer + layer;
}

// Where the graph computes it: ascending along the graph.
inline std::size_t graph_order(Site site, std::size_t layer) noexcept {
    constexpr std::array<std::size_t, n_sites> within = {2, 0, 1};  // attention, mlp, then the block's output
    return layer * n_sites + within[static_cast<std::size_t>(site)];
}

}  // namespace pysteer
