#include "plan.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "shares.hpp"

namespace pysteer {
namespace {

// True if a postfix expression leaves exactly one value and names only gates below n.
bool well_formed(const std::vector<int32_t> & rule, std::size_t n) noexcept {
    std::size_t depth = 0;
    for (const int32_t code : rule) {
        const bool two = code == rule_and || code == rule_or;
        if (code < rule_not || (code >= 0 && static_cast<std::size_t>(code) >= n) || (two && depth < 2) ||
            (code == rule_not && depth < 1)) {
            return false;
        }
        depth = code >= 0 ? depth + 1 : two ? depth - 1 : depth;
    }
    return depth == 1;
}

}  // namespace

uint64_t Plan::next_id() noexcept {
    static std::atomic<uint64_t> last{0};
    return ++last;
}

void Plan::add(Term term, Site site, const int32_t * layers, std::size_t n_layers, const float * rows,
               std::size_t n_rows, std::shared_ptr<const void> owner) {
    for (std::size_t k = 0; k < n_layers; ++k) {
        if (layers[k] < 0 || static_cast<std::size_t>(layers[k]) >= n_layer_) {
            throw std::invalid_argument("the model has no layer " + std::to_string(layers[k]) + ", only layers 0 to " +
                                        std::to_string(n_layer_ - 1));
        }
    }
    for (std::size_t k = 0; k < n_layers; ++k) {
        const std::size_t place = place_index({site, static_cast<std::size_t>(layers[k])}, n_layer_);
        add_op(place, term.op, {terms_.size(), rows + k * n_rows * n_embd_, n_rows});
        term.places.push_back(place);
        term.only_last_block = term.only_last_block && static_cast<std::size_t>(layers[k]) + 1 == n_layer_;
        term.only_control_vector = term.only_control_vector && site == Site::residual && layers[k] > 0;
    }
    term.only_control_vector = term.only_control_vector && term.op.sums();
    float factor = 1.0f;
    for (const float value : term.scope.values) {
        factor = std::max(factor, std::fabs(value));
    }
    bound_ += static_cast<double>(std::fabs(term.strength)) * static_cast<double>(factor) *
              static_cast<double>(largest(rows, n_layers * n_rows * n_embd_)) * static_cast<double>(n_layers);
    uniform_ = uniform_ && !term.gated() && term.exclude_bit < 0 && term.scope.kind == Scope::Kind::all;
    uses_products_ = uses_products_ || site != Site::residual;
    most_rows_ = std::max(most_rows_, n_rows);
    terms_.push_back(std::move(term));
    owners_.push_back(std::move(owner));
}

void Plan::add_op(std::size_t place, const Operator & op, const Op & added) {
    std::vector<double> & gram = grams_[place];
    ops_[place].push_back(added);
    for (const Op & other : ops_[place]) {
        const Operator & of_other = other.term < terms_.size() ? terms_[other.term].op : op;
        gram.push_back(likeness(op, added.rows, added.n_rows, of_other, other.rows, other.n_rows, n_embd_));
    }
    most_ops_ = std::max(most_ops_, ops_[place].size());
}

void Plan::set_gate(std::shared_ptr<const Gate> gate, std::vector<double> thresholds, std::vector<uint8_t> above,
                    ConflictRule conflict, int64_t recheck) {
    const std::size_t n = gate->n_categories();
    if (gate->n_embd() != n_embd_ || gate->layer() >= n_layer_) {
        throw std::invalid_argument("the router reads up to layer " + std::to_string(gate->layer()) + " of width " +
                                    std::to_string(gate->n_embd()) + "; the plan is for " + std::to_string(n_layer_) +
                                    " layers of width " + std::to_string(n_embd_));
    }
    if (thresholds.size() != n || above.size() != n || recheck < 0) {
        throw std::invalid_argument("expected a threshold and a direction of comparison for each of " +
                                    std::to_string(n) + " categories and recheck >= 0, found " +
                                    std::to_string(thresholds.size()) + ", " + std::to_string(above.size()) + " and " +
                                    std::to_string(recheck));
    }
    for (const Term & term : terms_) {
        if (term.gated() && (!well_formed(term.rule, n) || term.own_gate >= static_cast<int32_t>(n))) {
            throw std::invalid_argument("a rule is malformed or names a gate beyond the " + std::to_string(n) +
                                        " of the router");
        }
    }
    uses_products_ = uses_products_ || gate->site() != Site::residual;
    gate_ = std::move(gate);
    thresholds_ = std::move(thresholds);
    above_ = std::move(above);
    conflict_ = conflict;
    recheck_ = recheck;
}

bool Plan::acts_before_gate(const Term & term) const noexcept {
    return std::any_of(term.places.begin(), term.places.end(),
                       [&](std::size_t at) { return before_gate(place_at(at, n_layer_)); });
}

bool Plan::fits_resident() const noexcept {
    return uniform_ && std::all_of(terms_.begin(), terms_.end(), [](const Term & t) { return t.only_control_vector; });
}

void Plan::sum(Place place, const float * factors, float * out) const noexcept {
    const std::vector<Op> & added = ops(place);
    bool first = true;
    for (std::size_t k = 0; k < added.size(); ++k) {
        if (factors[k] != 0.0f) {
            add_scaled(out, first, factors[k], added[k].rows, n_embd_);
            first = false;
        }
    }
    if (first) {
        std::fill(out, out + n_embd_, 0.0f);
    }
}

void Plan::check_finite() const {
    if (stays_finite()) {
        return;
    }
    std::vector<float> row(n_embd_);
    Shares shares;
    shares.reserve(most_ops_);
    for (std::size_t place = 0; place < ops_.size(); ++place) {
        std::vector<float> factors;
        for (const Op & op : ops_[place]) {
            factors.push_back(terms_[op.term].strength);
        }
        shares.apply(grams_[place].data(), factors.size(), factors.data());
        bool first = true;
        for (std::size_t n = 0; n < factors.size(); ++n) {
            const Op & op = ops_[place][n];
            for (std::size_t k = 0; k < op.n_rows; ++k) {
                add_scaled(row.data(), first, factors[n], op.rows + k * n_embd_, n_embd_);
                first = false;
            }
        }
        if (!first && !std::all_of(row.begin(), row.end(), [](float value) { return std::isfinite(value); })) {
            throw std::invalid_argument("the direction of layer " + std::to_string(place_at(place, n_layer_).layer) +
                                        " times its strength is not finite; lower the strength");
        }
    }
}

}  // namespace pysteer
