// What a request asks for, compiled: which operators act at which site and layer, on which tokens, and what a gate has
// to find before they do. Immutable once built, so that any number of sequences share it without locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "gate.hpp"
#include "operators.hpp"
#include "scope.hpp"
#include "site.hpp"

namespace pysteer {

// How directions get in: into llama.cpp's control-vector tensors, by the hook, or whichever can.
enum class Injection : int32_t { automatic, resident, hooked };

// What happens when several gated terms fire.
enum class ConflictRule : int32_t { sum, strongest, first };

// A boolean expression over gates in postfix: n >= 0 is gate n.
enum RuleCode : int32_t { rule_and = -1, rule_or = -2, rule_not = -3 };

// One category: an operator with its strength, scope and gate.
struct Term {
    Operator op;
    float strength = 1.0f;
    Scope scope;
    uint64_t digest = 0;              // of the steering vector
    int32_t exclude_bit = -1;         // rows whose mask has this bit are left alone
    std::vector<int32_t> rule;        // gated; empty: forced
    int32_t own_gate = -1;            // the category's own column of the gate, or -1
    bool only_control_vector = true;  // it adds to the residual of layers >= 1 and nothing else
    bool only_last_block = true;      // no key or value of the KV cache depends on it
    std::vector<std::size_t> places;

    bool gated() const noexcept { return !rule.empty(); }
};

class Plan {
  public:
    Plan(std::size_t n_layer, std::size_t n_embd, Injection injection)
        : n_layer_(n_layer), n_embd_(n_embd), injection_(injection), ops_(n_sites * n_layer) {}

    // What a term does at one place: n_rows rows of n_embd values.
    struct Op {
        std::size_t term;
        const float * rows;
        std::size_t n_rows;
    };

    // Appends a term that acts at a site's layers[k] with the rows at rows[k]; rows is row-major, n_layers x n_rows x
    // n_embd, and lives as long as the plan holds `owner`. Throws std::invalid_argument for a layer out of range.
    void add(Term term, Site site, const int32_t * layers, std::size_t n_layers, const float * rows, std::size_t n_rows,
             std::shared_ptr<const void> owner);

    // Gives gated terms what they wait for: category i's gate is open where its score is at least (above) or at most
    // thresholds[i]. recheck: decide anew every so many response tokens; 0 is never. Throws std::invalid_argument for
    // sizes or rules that do not fit.
    void set_gate(std::shared_ptr<const Gate> gate, std::vector<double> thresholds, std::vector<uint8_t> above,
                  ConflictRule conflict, int64_t recheck);

    // Throws std::invalid_argument if the terms together add a value that is not finite at any place. Free where
    // stays_finite(); otherwise every sum is computed.
    void check_finite() const;

    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }
    Injection injection() const noexcept { return injection_; }
    const std::vector<Term> & terms() const noexcept { return terms_; }
    const std::vector<Op> & ops(Place place) const noexcept { return ops_[place_index(place, n_layer_)]; }
    std::size_t most_rows() const noexcept { return most_rows_; }

    // Null where no term is gated.
    const Gate * gate() const noexcept { return gate_.get(); }
    const std::vector<double> & thresholds() const noexcept { return thresholds_; }
    const std::vector<uint8_t> & above() const noexcept { return above_; }
    ConflictRule conflict() const noexcept { return conflict_; }
    int64_t recheck() const noexcept { return recheck_; }
    // Whether a place comes before the one where the gate decides.
    bool before_gate(Place place) const noexcept { return gate_ && graph_order(place) < graph_order(gate_->place()); }
    // Whether a term acts at such a place.
    bool acts_before_gate(const Term & term) const noexcept;

    // Whether every token of every sequence gets the same: nothing gated, excluded or limited to some tokens.
    bool uniform() const noexcept { return uniform_; }
    bool fits_resident() const noexcept;
    // Whether additions alone, however many layers they meet in, cannot take an activation past float32.
    bool stays_finite() const noexcept { return bound_ < 1e38; }
    // Whether a term acts, or the gate looks, at the sites attention or mlp.
    bool uses_products() const noexcept { return uses_products_; }

    // Writes the sum of what the ops at a place add, each times its factor; n_embd values. The ops are additions. Zeros
    // where no factor differs from 0.
    void sum(Place place, const float * factors, float * out) const noexcept;

  private:
    std::size_t n_layer_;
    std::size_t n_embd_;
    Injection injection_;
    std::vector<Term> terms_;
    std::vector<std::shared_ptr<const void>> owners_;
    std::vector<std::vector<Op>> ops_;  // per place, in the order of the terms
    std::size_t most_rows_ = 0;
    double bound_ = 0.0;  // of what all additions together add to a value
    bool uniform_ = true;
    bool uses_products_ = false;
    std::shared_ptr<const Gate> gate_;
    std::vector<double> thresholds_;
    std::vector<uint8_t> above_;
    ConflictRule conflict_ = ConflictRule::sum;
    int64_t recheck_ = 0;
};

}  // namespace pysteer
