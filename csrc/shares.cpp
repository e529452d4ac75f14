#include "shares.hpp"

#include <algorithm>
#include <cmath>

namespace pysteer {
namespace {

// Relative to |a_i|^2: the error of a category's change, and the addition to the diagonal that keeps the system of
// nearly equal changes solvable.
constexpr double slack = 1e-10;

}  // namespace

void Shares::reserve(std::size_t n) {
    if (n <= room_) {
        return;
    }
    room_ = n;
    index_.resize(n);
    gram_.resize(n * n);
    shares_.resize(n);
    states_.resize(n);
    moving_.reserve(n);
    target_.resize(n);
    factor_.resize(n * n);
}

void Shares::apply(const double * gram, std::size_t n, float * factors) noexcept {
    if (n < 2 || !gather(gram, n, factors)) {
        return;
    }
    solve();
    for (std::size_t i = 0; i < n_; ++i) {
        float & factor = factors[index_[i]];
        factor = static_cast<float>(static_cast<double>(factor) * shares_[i]);
    }
}

// Returns false if no two changes are alike.
bool Shares::gather(const double * gram, std::size_t n, const float * factors) noexcept {
    const auto at = [&](std::size_t row, std::size_t column) { return gram[row * (row + 1) / 2 + column]; };
    n_ = 0;
    for (std::size_t k = 0; k < n; ++k) {
        if (factors[k] != 0.0f && at(k, k) > 0.0) {
            index_[n_++] = k;
        }
    }
    bool alike = false;
    for (std::size_t i = 0; i < n_; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            const double product = static_cast<double>(factors[index_[i]]) * static_cast<double>(factors[index_[j]]) *
                                   at(index_[i], index_[j]);
            gram_[i * n_ + j] = gram_[j * n_ + i] = product;
            alike = alike || (i != j && product > 0.0);
        }
    }
    return alike;
}

// An active-set method for bounded variables (Stark and Parker 1995). Starts with the plain sum and never goes up, so
// that the bound on the number of steps, which rounding alone can reach, leaves no more than the plain sum.
void Shares::solve() noexcept {
    std::fill_n(shares_.begin(), n_, 1.0);
    std::fill_n(states_.begin(), n_, at_one);
    moving_.clear();
    for (std::size_t step = 0; step < 10 * n_; ++step) {
        const std::size_t freed = most_violated();
        if (freed == n_) {
            return;
        }
        states_[freed] = free;
        moving_.push_back(freed);
        while (!moving_.empty() && !move_free()) {
        }
    }
}

// The share that most violates the condition at its bound, the first of equal shares; n_ if none.
std::size_t Shares::most_violated() const noexcept {
    std::size_t found = n_;
    double most = slack;
    for (std::size_t i = 0; i < n_; ++i) {
        if (states_[i] == free) {
            continue;
        }
        const double * row = gram_.data() + i * n_;
        double product = 0.0;  // x.a_i
        for (std::size_t j = 0; j < n_; ++j) {
            product += row[j] * shares_[j];
        }
        const double excess = product / row[i] - 1.0;
        const double violation = states_[i] == at_one ? excess : -excess;
        if (violation > most) {
            most = violation;
            found = i;
        }
    }
    return found;
}

// Moves the free shares to the minimum over them, or towards the minimum up to the first bound, where a share stays.
// Returns true if the minimum was reached.
bool Shares::move_free() noexcept {
    solve_free();
    double step = 1.0;
    for (std::size_t k = 0; k < moving_.size(); ++k) {
        const double from = shares_[moving_[k]];
        const double to = target_[k];
        if (to < 0.0 || to > 1.0) {
            step = std::min(step, ((to < 0.0 ? 0.0 : 1.0) - from) / (to - from));
        }
    }
    std::size_t left = 0;
    for (std::size_t k = 0; k < moving_.size(); ++k) {
        const std::size_t i = moving_[k];
        const double from = shares_[i];
        const double to = target_[k];
        const bool leaves = to < 0.0 || to > 1.0;
        if (leaves && ((to < 0.0 ? 0.0 : 1.0) - from) / (to - from) <= step) {
            states_[i] = to < 0.0 ? at_zero : at_one;
            shares_[i] = to < 0.0 ? 0.0 : 1.0;
            continue;
        }
        shares_[i] = step < 1.0 ? std::clamp(from + step * (to - from), 0.0, 1.0) : to;
        moving_[left++] = i;
    }
    const bool reached = left == moving_.size();
    moving_.resize(left);
    return reached;
}

// Minimises over the free shares without bounds; the other shares stay.
void Shares::solve_free() noexcept {
    const std::size_t m = moving_.size();
    for (std::size_t r = 0; r < m; ++r) {
        const double * row = gram_.data() + moving_[r] * n_;
        double right = row[moving_[r]];
        for (std::size_t j = 0; j < n_; ++j) {
            right -= states_[j] == at_one ? row[j] : 0.0;
        }
        double * lower = factor_.data() + r * m;
        for (std::size_t c = 0; c <= r; ++c) {
            double value = row[moving_[c]] * (c == r ? 1.0 + slack : 1.0);
            for (std::size_t k = 0; k < c; ++k) {
                value -= lower[k] * factor_[c * m + k];
            }
            lower[c] =
                c == r ? std::sqrt(std::max(value, slack * slack * row[moving_[r]])) : value / factor_[c * m + c];
        }
        for (std::size_t c = 0; c < r; ++c) {
            right -= lower[c] * target_[c];
        }
        target_[r] = right / lower[r];
    }
    for (std::size_t r = m; r-- > 0;) {
        for (std::size_t k = r + 1; k < m; ++k) {
            target_[r] -= factor_[k * m + r] * target_[k];
        }
        target_[r] /= factor_[r * m + r];
    }
}

}  // namespace pysteer
