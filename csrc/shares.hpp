// The share of each category in a change that several categories make at one place.
//
// Categories with alike directions would add up to a multiple of each strength. With the
// changes a_1 ... a_n that the categories make alone, the change together is x = sum t_i a_i, with the shares t_i in
// [0, 1] that minimise
//
//     1/2 |x|^2 - sum t_i |a_i|^2.
//
// At the minimum each category with 0 < t_i has x.a_i <= |a_i|^2, with equality where t_i < 1: a category adds as much
// of its own direction as the others leave missing. Orthogonal and opposed changes add up (t = 1), of
// parallel ones the longest counts, two of equal length with cosine c > 0 have t = 1 / (1 + c). x is unique, continuous
// in the a_i, and never longer than the plain sum: at t = 1 the second term is smallest, so the first can only fall.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pysteer {

// Holds the memory, so that solve() allocates nothing.
class Shares {
  public:
    // Makes room for n changes.
    void reserve(std::size_t n);

    // Multiplies each factor by its share. gram: inner products of the changes at factor 1 in double precision, the
    // lower triangle row by row. A single change, or changes of which no two are alike, keep their factors.
    void apply(const double * gram, std::size_t n, float * factors) noexcept;

  private:
    enum State : uint8_t { at_zero, at_one, free };

    bool gather(const double * gram, std::size_t n, const float * factors) noexcept;
    void solve() noexcept;
    std::size_t most_violated() const noexcept;
    bool move_free() noexcept;
    void solve_free() noexcept;

    std::size_t room_ = 0;
    std::size_t n_ = 0;                // changes that are not zero
    std::vector<std::size_t> index_;   // of each among the factors
    std::vector<double> gram_;         // n_ x n_, scaled by the factors
    std::vector<double> shares_;       // t
    std::vector<State> states_;        // of the shares
    std::vector<std::size_t> moving_;  // the free ones
    std::vector<double> target_;       // the minimum over the free ones
    std::vector<double> factor_;       // Cholesky factor of their part of the Gram matrix
};

}  // namespace pysteer
