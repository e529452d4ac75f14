// A router's score of each of its categories for a hidden state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.hpp"

namespace pysteer {

// Immutable. The scores equal those of pysteer.pack.router.Router; like there, sums are taken in double precision.
class Gate {
  public:
    enum class Kind : int32_t {
        margin,       // r = W h + b: min(-r[0], r[c] - the largest of the others + allowances[c])
        multinomial,  // softmax(W h + b), without its first column
        probe,        // W h + b
        centroid,     // cosine(h - origin, W_c), W already measured from the origin
        cast,         // cosine(h, tanh((W_c.h) W_c)), W of unit rows
    };

    // One part of the hidden state h, the concatenation of the reads, n_embd values each.
    struct Read {
        std::size_t layer;
        bool pools;  // the mean over a span of tokens; otherwise the row of the token that decides
    };

    // weights: n_rows x width, where width is the number of reads times n_embd. offsets: n_rows values, origin: width
    // values, allowances: n_categories values; each empty where the kind has none. Throws std::invalid_argument for
    // sizes that do not fit.
    Gate(Site site, std::vector<Read> reads, Kind kind, std::size_t n_embd, std::vector<double> weights,
         std::vector<double> offsets, std::vector<double> origin, std::vector<double> allowances);

    Site site() const noexcept { return site_; }
    const std::vector<Read> & reads() const noexcept { return reads_; }
    // The highest layer read: the gate decides there.
    std::size_t layer() const noexcept { return layer_; }
    Place place() const noexcept { return {site_, layer_}; }
    bool reads_at(Place place) const noexcept;
    std::size_t n_embd() const noexcept { return n_embd_; }
    std::size_t width() const noexcept { return reads_.size() * n_embd_; }
    std::size_t n_rows() const noexcept { return n_rows_; }
    std::size_t n_categories() const noexcept { return has_benign_row() ? n_rows_ - 1 : n_rows_; }

    // Writes n_categories() scores, and as many ranks, by which open gates are compared: the scores, except for margin,
    // whose scores may be equal for all open gates. Both buffers have room for n_rows() values.
    void scores(const double * h, double * out, double * ranks) const noexcept;

  private:
    bool has_benign_row() const noexcept { return kind_ == Kind::margin || kind_ == Kind::multinomial; }
    void softmax(double * out) const noexcept;
    void margins(double * out, double * ranks) const noexcept;
    double cosine(const double * h, const double * row) const noexcept;
    double condition(const double * h, const double * row) const noexcept;

    Site site_;
    std::vector<Read> reads_;
    std::size_t layer_ = 0;
    Kind kind_;
    std::size_t n_embd_;
    std::size_t n_rows_;
    std::vector<double> weights_;
    std::vector<double> offsets_;
    std::vector<double> origin_;
    std::vector<double> allowances_;
};

}  // namespace pysteer
