// The steering of one row at one place under the plan of its sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.hpp"
#include "sequence.hpp"
#include "shares.hpp"
#include "site.hpp"

namespace pysteer {

// Holds the buffers, and the last shares and sum of directions: the rows of a node mostly get the same.
class Steerer {
  public:
    void resize(std::size_t n_embd);
    // Makes room for a plan.
    void reserve(const Plan & plan);

    // True if the plan acts on a token at a place.
    static bool acts(const Sequence & sequence, int64_t position, Place place) noexcept;

    enum class Way { none, additions, operators };
    // Finds the factors of the ops at a place for a token, and how they act together.
    Way find_factors(const Sequence & sequence, int64_t position, Place place) noexcept;
    // Those factors, one for each op.
    const float * factors() const noexcept { return factors_.data(); }
    // The sum of additions with those factors, n_embd values; valid until the next call.
    const float * sum(const Plan & plan, Place place) noexcept;

    // Call before the rows of each node.
    void begin_node() noexcept { shared_for_ = nullptr; }
    // Steers the row of a token, n_embd values; returns true if the plan acts on it.
    bool steer(const Sequence & sequence, int64_t position, Place place, float * values) noexcept;

    // The sum that a plan of additions adds to the row of a token, n_embd values; valid until the next call.
    const float * addition(const Sequence & sequence, int64_t position, Place place) noexcept;

  private:
    void find_shares(const Plan & plan, Place place) noexcept;
    void apply_in_order(const Plan & plan, Place place, float * values) noexcept;

    std::size_t n_embd_ = 0;
    std::vector<float> factors_;         // of the ops at the place, for one row
    const Plan * shared_for_ = nullptr;  // whose shares are in shared_
    std::vector<float> unshared_;        // the factors that shared_ was made from
    std::vector<float> shared_;          // the factors times their shares
    Shares shares_;
    bool summed_ = false;          // sum_ holds the sum of the additions in shared_
    std::vector<float> sum_;       // n_embd values
    std::vector<double> scratch_;  // for low-rank maps
};

}  // namespace pysteer
