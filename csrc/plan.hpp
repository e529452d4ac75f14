// A compiled request: which operators act at which site and layer, on which tokens, and which gates must open before
// they do. Immutable once built, so that any number of sequences share a plan without locks.
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

// Route of directions into the graph: llama.cpp's control-vector tensors, the hook, or automatic.
enum class Injection : int32_t { automatic, resident, hooked };

// Choice among several gated terms that fire.
enum class ConflictRule : int32_t { sum, strongest, first };

// A boolean expression over gates in postfix: n >= 0 is gate n.
enum RuleCode : int32_t { rule_and = -1, rule_or = -2, rule_not = -3 };

// One category: an operator with its strength, scope and gate.
struct Term {
    Operator op;
    float strength = 1.0f;
    Scope scope;
    uint64_t digest = 0;              // of the steering vector
    int32_t exclude_bit = -1;         // the term skips tokens whose mask has this bit; -1: no token
    std::vector<int32_t> rule;        // when the term fires; empty: forced
    int32_t own_gate = -1;            // the gate of the term's own category; -1: no gate
    bool only_control_vector = true;  // adds to the residual of layers >= 1 and does nothing else
    bool only_last_block = true;      // no key or value of the KV cache depends on the term
    std::vector<std::size_t> places;  // place_index() of each

    bool gated() const noexcept { return !rule.empty(); }
};

class Plan {
  public:
    Plan(std::size_t n_layer, std::size_t n_embd, Injection injection)
        : id_(next_id()),
          n_layer_(n_layer),
          n_embd_(n_embd),
          injection_(injection),
          ops_(n_sites * n_layer),
          grams_(n_sites * n_layer) {}

    // A term at one place: n_rows rows of n_embd values.
    struct Op {
        std::size_t term;
        const float * rows;
        std::size_t n_rows;
    };

    // Appends a term that acts at layers[k] of a site with rows[k]; `rows` is n_layers x n_rows x n_embd and lives as
    // long as the plan holds `owner`. Throws std::invalid_argument for a layer out of range.
    void add(Term term, Site site, const int32_t * layers, std::size_t n_layers, const float * rows, std::size_t n_rows,
             std::shared_ptr<const void> owner);

    // Sets the gates that the rules of the terms name: gate i is open where the score of category i is at least (above)
    // or at most thresholds[i]. recheck: response tokens between two decisions; 0: decide once. Throws
    // std::invalid_argument for sizes or rules that do not fit.
    void set_gate(std::shared_ptr<const Gate> gate, std::vector<double> thresholds, std::vector<uint8_t> above,
                  ConflictRule conflict, int64_t recheck);

    // Throws std::invalid_argument if the terms together add a value that is not finite at any place. Free where
    // stays_finite(); otherwise every sum is computed.
    void check_finite() const;

    // Unlike that of any other plan of the process; never 0.
    uint64_t id() const noexcept { return id_; }
    std::size_t n_layer() const noexcept { return n_layer_; }
    std::size_t n_embd() const noexcept { return n_embd_; }
    Injection injection() const noexcept { return injection_; }
    const std::vector<Term> & terms() const noexcept { return terms_; }
    const std::vector<Op> & ops(Place place) const noexcept { return ops_[place_index(place, n_layer_)]; }
    std::size_t most_rows() const noexcept { return most_rows_; }

    // Null if no term is gated.
    const Gate * gate() const noexcept { return gate_.get(); }
    const std::vector<double> & thresholds() const noexcept { return thresholds_; }
    const std::vector<uint8_t> & above() const noexcept { return above_; }
    ConflictRule conflict() const noexcept { return conflict_; }
    int64_t recheck() const noexcept { return recheck_; }
    // True if the graph computes a place before the gate decides.
    bool before_gate(Place place) const noexcept { return gate_ && graph_order(place) < graph_order(gate_->place()); }
    // True if a term acts at a place before the gate decides.
    bool acts_before_gate(const Term & term) const noexcept;

    // True if every token of every sequence gets the same: no term is gated, excluded or limited to some tokens.
    bool uniform() const noexcept { return uniform_; }
    bool fits_resident() const noexcept;
    // True if additions alone, summed over all layers, cannot take an activation past float32.
    bool stays_finite() const noexcept { return bound_ < 1e38; }
    // True if a term or the gate uses the sites attention or mlp.
    bool uses_products() const noexcept { return uses_products_; }

    // Inner products of the changes by the ops at a place at factor 1, the lower triangle row by row; see likeness().
    const double * gram(Place place) const noexcept { return grams_[place_index(place, n_layer_)].data(); }
    std::size_t most_ops() const noexcept { return most_ops_; }

    // Writes the sum of the directions at a place, each times its factor; n_embd values, zeros if all factors are 0.
    // Ops whose factor is not 0 must be additions.
    void sum(Place place, const float * factors, float * out) const noexcept;

  private:
    static uint64_t next_id() noexcept;
    void add_op(std::size_t place, const Operator & op, const Op & added);

    uint64_t id_;
    std::size_t n_layer_;
    std::size_t n_embd_;
    Injection injection_;
    std::vector<Term> terms_;
    std::vector<std::shared_ptr<const void>> owners_;
    std::vector<std::vector<Op>> ops_;  // by place, in the order of the terms
    std::vector<std::vector<double>> grams_;
    std::size_t most_rows_ = 0;
    std::size_t most_ops_ = 0;  // at one place
    double bound_ = 0.0;        // of the absolute value of the sum of all additions
    bool uniform_ = true;
    bool uses_products_ = false;
    std::shared_ptr<const Gate> gate_;
    std::vector<double> thresholds_;
    std::vector<uint8_t> above_;
    ConflictRule conflict_ = ConflictRule::sum;
    int64_t recheck_ = 0;
};

}  // namespace pysteer
