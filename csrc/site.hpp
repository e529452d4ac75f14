// The places where a model can be steered: a site of a block.
#pragma once

#include <array>
#include <cstddef>
#include <string>

namespace pysteer {

// The residual is the block's output; attention and mlp are the block's additions to the residual.
enum class Site : std::size_t { residual = 0, attention = 1, mlp = 2 };
inline constexpr std::size_t n_sites = 3;
inline constexpr std::array<Site, n_sites> all_sites = {Site::residual, Site::attention, Site::mlp};

inline const char * site_name(Site site) noexcept {
    constexpr std::array<const char *, n_sites> names = {"residual", "attention", "mlp"};
    return names[static_cast<std::size_t>(site)];
}

struct Place {
    Site site = Site::residual;
    std::size_t layer = 0;
};

inline bool operator==(Place a, Place b) noexcept {
    return a.site == b.site && a.layer == b.layer;
}

// "site residual, layer 1"
inline std::string place_name(Place place) {
    return std::string("site ") + site_name(place.site) + ", layer " + std::to_string(place.layer);
}

// A place as a number below n_sites * n_layer, and back.
inline std::size_t place_index(Place place, std::size_t n_layer) noexcept {
    return static_cast<std::size_t>(place.site) * n_layer + place.layer;
}
inline Place place_at(std::size_t index, std::size_t n_layer) noexcept {
    return {static_cast<Site>(index / n_layer), index % n_layer};
}

// Ascending in the order in which the graph computes the places.
inline std::size_t graph_order(Place place) noexcept {
    constexpr std::array<std::size_t, n_sites> within = {2, 0, 1};  // attention, mlp, then the block's output
    return place.layer * n_sites + within[static_cast<std::size_t>(place.site)];
}

}  // namespace pysteer
