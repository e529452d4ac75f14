// What a pack's router sees in a hidden state: a score for each of its categories.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.hpp"

namespace pysteer {

// Immutable. The scores are those of pysteer.pack.router.Router, in double precision like there.
class Gate {
  public:
    enum class Kind : int32_t {
        margin,       // r = W h + b: min(-r[0], r[c] - the largest of the others + allowances[c])
        multinomial,  // softmax(W h + b), without its first column
        probe,        // W h + b
        centroid,     // cosine(h - origin, W_c), W already measured from the origin
        cast,         // cosine(h, tanh((W_c.h) W_c)), W of unit rows
    };

    // h is what its reads saw, end to end in their order, each n_embd values.
    struct Read {
        std::size_t layer;
        bool pools;  // over a span of tokens, rather than the one that decides
    };

    // With width the number of reads times n_embd: weights are n_rows x width. offsets: n_rows values, origin: width
    // values, allowances: n_categories values; empty where the kind has none. Throws std::invalid_argument for sizes
    // that do not fit.
    Gate(Site site, std::vector<Read> reads, Kind kind, std::size_t n_embd, std::vector<double> weights,
         std::vector<double> offsets, std::vector<double> origin, std::vector<double> allowances);

    Site site() const noexcept { return site_; }
    const std::vector<Read> & reads() const noexcept { return reads_; }
    // The highest of the reads', where it decides.
    std::size_t layer() const noexcept { return layer_; }
    Place place() const noexcept { return {site_, layer_}; }
    bool reads_at(Place place) const noexcept;
    std::size_t n_embd() const noexcept { return n_embd_; }
    std::size_t width() const noexcept { return reads_.size() * n_embd_; }
    std::size_t n_rows() const noexcept { return n_rows_; }
    std::size_t n_categories() const noexcept { return has_benign_row() ? n_rows_ - 1 : n_rows_; }

    // Writes n_categories() scores, and as many ranks, which several open gates are compared by: the scores, but for
    // margin, where all open gates may have the same. Both have room for n_rows().
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
