// What a pack's router sees in a hidden state: a score for each of its categories.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.hpp"

namespace pysteer {

// Immutable. The scores are those of pysteer.router.Router, in double precision like there.
class Gate {
  public:
    enum class Kind : int32_t {
        multinomial,  // softmax(W h + b), without its first column
        probe,        // W h + b
        centroid,     // cosine(h - origin, W_c), W already measured from the origin
        cast,         // cosine(h, tanh((W_c.h) W_c)), W of unit rows
    };

    // weights: n_rows x n_embd. offsets: n_rows values, origin: n_embd values; empty where the kind has none. Throws
    // std::invalid_argument for sizes that do not fit.
    Gate(Site site, std::size_t layer, Kind kind, std::size_t n_embd, std::vector<double> weights,
         std::vector<double> offsets, std::vector<double> origin);

    Site site() const noexcept { return site_; }
    std::size_t layer() const noexcept { return layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }
    std::size_t n_rows() const noexcept { return n_rows_; }
    std::size_t n_categories() const noexcept { return kind_ == Kind::multinomial ? n_rows_ - 1 : n_rows_; }

    // Writes n_categories() scores; `out` has room for n_rows().
    void scores(const double * h, double * out) const noexcept;

  private:
    double cosine(const double * h, const double * row) const noexcept;
    double condition(const double * h, const double * row) const noexcept;

    Site site_;
    std::size_t layer_;
    Kind kind_;
    std::size_t n_embd_;
    std::size_t n_rows_;
    std::vector<double> weights_;
    std::vector<double> offsets_;
    std::vector<double> origin_;
};

}  // namespace pysteer
