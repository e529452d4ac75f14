#include "sequence.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace pysteer {
namespace {

// splitmix64's finaliser (Steele, Lea and Flood 2014): every bit of the input reaches every bit of the output.
uint64_t mixed(uint64_t value) noexcept {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

uint64_t bits(float value) noexcept {
    uint32_t found = 0;
    std::memcpy(&found, &value, sizeof found);
    return found;
}

bool holds(const std::vector<int32_t> & rule, const uint8_t * open, uint8_t * stack) noexcept {
    std::size_t depth = 0;
    for (const int32_t code : rule) {
        if (code >= 0) {
            stack[depth++] = open[code];
        } else if (code == rule_not) {
            stack[depth - 1] = stack[depth - 1] == 0;
        } else {
            --depth;
            const bool left = stack[depth - 1] != 0;
            const bool right = stack[depth] != 0;
            stack[depth - 1] = code == rule_and ? left && right : left || right;
        }
    }
    return stack[0] != 0;
}

}  // namespace

Sequence::Sequence(std::shared_ptr<const Plan> plan, int64_t n_prompt, std::vector<Span> spans, int64_t n_positions)
    : plan_(std::move(plan)), has_gate_(plan_->gate() != nullptr), n_prompt_(n_prompt) {
    if (n_prompt < 0) {
        throw std::invalid_argument("expected n_prompt >= 0, found " + std::to_string(n_prompt));
    }
    if (!has_gate_) {
        return;
    }
    const std::vector<Gate::Read> & reads = plan_->gate()->reads();
    spans_ = std::move(spans);
    if (spans_.size() != reads.size()) {
        throw std::invalid_argument("expected a span for each of the router's " + std::to_string(reads.size()) +
                                    " reads, found " + std::to_string(spans_.size()));
    }
    for (std::size_t k = 0; k < spans_.size(); ++k) {
        if (!(0 <= spans_[k].start && spans_[k].start < spans_[k].stop && spans_[k].stop <= n_prompt)) {
            throw std::invalid_argument("the router needs a prompt token to read: its span [" +
                                        std::to_string(spans_[k].start) + ", " + std::to_string(spans_[k].stop) +
                                        ") is empty or outside the prompt of " + std::to_string(n_prompt) + " tokens");
        }
        if (!reads[k].pools) {
            spans_[k] = {n_prompt - 1, n_prompt};
        }
    }
    const int64_t checks = plan_->recheck() > 0 ? n_positions / plan_->recheck() + 2 : 1;
    decided_at_.reserve(static_cast<std::size_t>(checks));
    fired_.reserve(static_cast<std::size_t>(checks) * plan_->terms().size());
    summed_.assign(reads.size(), {});
    sums_.assign(plan_->gate()->width(), 0.0);
    scores_.assign(plan_->gate()->n_rows(), 0.0);
    ranks_.assign(plan_->gate()->n_rows(), 0.0);
    previous_scores_ = scores_;
    previous_ranks_ = ranks_;
    open_.assign(plan_->gate()->n_categories(), 0);
    std::size_t longest = 1;
    for (const Term & term : plan_->terms()) {
        longest = std::max(longest, term.rule.size());
    }
    stack_.assign(longest, 0);
}

float Sequence::factor(std::size_t term, int64_t position, bool before_gate) const noexcept {
    const Term & what = plan_->terms()[term];
    if (what.gated()) {
        // The last decision before the graph computes this row at the place.
        std::size_t decision = decided_at_.size();
        while (decision > 0 &&
               (decided_at_[decision - 1] > position || (decided_at_[decision - 1] == position && before_gate))) {
            --decision;
        }
        if (decision == 0 && !held_) {
            return 0.0f;
        }
        if (!fired(decision == 0 ? 0 : decision - 1, term)) {
            return 0.0f;
        }
    }
    if (excluded(what, position)) {
        return 0.0f;
    }
    return what.strength * what.scope.factor(position, n_prompt_);
}

bool Sequence::excluded(const Term & term, int64_t position) const noexcept {
    return term.exclude_bit >= 0 && static_cast<std::size_t>(position) < excluded_.size() &&
           ((excluded_[static_cast<std::size_t>(position)] >> term.exclude_bit) & 1u) != 0;
}

uint64_t Sequence::key(int64_t position, bool cached) const noexcept {
    uint64_t key = 0;
    for (std::size_t term = 0; term < plan_->terms().size(); ++term) {
        const float after = factor(term, position, false);
        const float before = has_gate_ ? factor(term, position, true) : after;
        if ((after == 0.0f && before == 0.0f) || (cached && plan_->terms()[term].only_last_block)) {
            continue;
        }
        key = mixed(key ^ plan_->terms()[term].digest);
        key = mixed(key ^ (bits(after) << 32 | bits(before)));
        if (bits(before) != bits(after)) {  // steered in the layers after the gate only
            key = mixed(key ^ graph_order(plan_->gate()->place()));
        }
    }
    return key;
}

int64_t Sequence::tokens_steered(std::size_t term, int64_t n_tokens) const noexcept {
    int64_t count = 0;
    for (int64_t position = 0; position < n_tokens; ++position) {
        count += acts(term, position) ? 1 : 0;
    }
    return count;
}

int64_t Sequence::tokens_steered(int64_t n_tokens) const noexcept {
    int64_t count = 0;
    for (int64_t position = 0; position < n_tokens; ++position) {
        bool any = false;
        for (std::size_t term = 0; term < plan_->terms().size() && !any; ++term) {
            any = acts(term, position);
        }
        count += any ? 1 : 0;
    }
    return count;
}

bool Sequence::decides(int64_t position) const noexcept {
    if (!has_gate_ || (!decided_at_.empty() && decided_at_.back() >= position)) {
        return false;  // decided already: this token is computed again
    }
    const int64_t r = response_index(position);
    return r == 0 || (r > 0 && plan_->recheck() > 0 && r % plan_->recheck() == 0);
}

int64_t Sequence::next_decision() const noexcept {
    if (!has_gate_) {
        return -1;
    }
    if (decided_at_.empty()) {
        return n_prompt_ - 1;
    }
    const int64_t recheck = plan_->recheck();
    return recheck > 0 ? n_prompt_ - 1 + (response_index(decided_at_.back()) / recheck + 1) * recheck : -1;
}

// True if a read takes the row of a position after the last decision.
bool Sequence::counts(std::size_t read, int64_t position) const noexcept {
    if (decided_at_.empty()) {
        return spans_[read].holds(position) &&
               std::none_of(left_out_.begin(), left_out_.end(), [&](Span span) { return span.holds(position); });
    }
    return plan_->recheck() > 0 && (plan_->gate()->reads()[read].pools || decides(position));
}

int64_t Sequence::due(std::size_t read) const noexcept {
    const Span & span = spans_[read];
    int64_t due = span.stop - span.start;
    for (const Span & left_out : left_out_) {
        due -= std::max<int64_t>(std::min(span.stop, left_out.stop) - std::max(span.start, left_out.start), 0);
    }
    return due;
}

bool Sequence::reads(int64_t position) const noexcept {
    if (!has_gate_ || (!decided_at_.empty() && decided_at_.back() >= position)) {
        return false;
    }
    bool any = decides(position);
    for (std::size_t k = 0; k < spans_.size() && !any; ++k) {
        any = counts(k, position);
    }
    return any;
}

bool Sequence::reads_at(Place place, int64_t position) const noexcept {
    if (!has_gate_ || !plan_->gate()->reads_at(place) || !reads(position)) {
        return false;
    }
    const Gate & gate = *plan_->gate();
    bool any = place.layer == gate.layer() && decides(position);
    for (std::size_t k = 0; k < spans_.size() && !any; ++k) {
        any = gate.reads()[k].layer == place.layer && counts(k, position);
    }
    return any;
}

bool Sequence::read(Place place, int64_t position, const float * row) {
    if (!reads_at(place, position)) {
        return false;
    }
    const Gate & gate = *plan_->gate();
    for (std::size_t k = 0; k < spans_.size(); ++k) {
        if (gate.reads()[k].layer == place.layer && counts(k, position)) {
            accumulate_row(k, position, row);
        }
    }
    if (place.layer != gate.layer() || !decides(position)) {
        return false;
    }
    const bool first = decided_at_.empty();
    for (std::size_t k = 0; k < spans_.size() && first; ++k) {
        if (summed_[k].count != due(k)) {
            throw std::runtime_error("the router read " + std::to_string(summed_[k].count) + " of the " +
                                     std::to_string(due(k)) + " tokens that it averages over");
        }
    }
    decide(position);
    return true;
}

void Sequence::accumulate_row(std::size_t read, int64_t position, const float * row) noexcept {
    double * sum = sums_.data() + read * plan_->n_embd();
    if (position <= summed_[read].to) {  // the tokens are computed again
        std::fill(sum, sum + plan_->n_embd(), 0.0);
        summed_[read].count = 0;
    }
    accumulate(sum, row, plan_->n_embd());
    ++summed_[read].count;
    summed_[read].to = position;
}

void Sequence::decide(int64_t position) {
    for (std::size_t i = 0; i < sums_.size(); ++i) {
        sums_[i] /= static_cast<double>(summed_[i / plan_->n_embd()].count);
        if (!std::isfinite(sums_[i])) {
            throw std::runtime_error("the hidden state that the router reads is not finite");
        }
    }
    scores_.swap(previous_scores_);
    ranks_.swap(previous_ranks_);
    plan_->gate()->scores(sums_.data(), scores_.data(), ranks_.data());
    open_gates();
    fire_terms();
    decided_at_.push_back(position);
    restart();
}

void Sequence::open_gates() noexcept {
    for (std::size_t k = 0; k < open_.size(); ++k) {
        const double threshold = plan_->thresholds()[k];
        open_[k] = plan_->above()[k] != 0 ? scores_[k] >= threshold : scores_[k] <= threshold;
    }
}

double Sequence::excess(const Term & term) const noexcept {
    if (term.own_gate < 0) {
        return 0.0;
    }
    const auto own = static_cast<std::size_t>(term.own_gate);
    return (ranks_[own] - plan_->thresholds()[own]) * (plan_->above()[own] != 0 ? 1.0 : -1.0);
}

// Appends to fired_ the terms whose rules hold, or, by the plan's rule of conflict, one of them.
void Sequence::fire_terms() {
    const std::vector<Term> & terms = plan_->terms();
    const std::size_t start = fired_.size();
    std::size_t chosen = terms.size();
    for (std::size_t t = 0; t < terms.size(); ++t) {
        const bool fires = terms[t].gated() && holds(terms[t].rule, open_.data(), stack_.data());
        fired_.push_back(fires ? 1 : 0);
        if (fires && (chosen == terms.size() ||
                      (plan_->conflict() == ConflictRule::strongest && excess(terms[t]) > excess(terms[chosen])))) {
            chosen = t;
        }
    }
    if (plan_->conflict() == ConflictRule::sum) {
        return;
    }
    for (std::size_t t = 0; t < terms.size(); ++t) {
        fired_[start + t] = t == chosen ? 1 : 0;
    }
}

bool Sequence::wants_reprocess() const noexcept {
    if (held_ || decided_at_.empty()) {
        return false;
    }
    for (std::size_t t = 0; t < plan_->terms().size(); ++t) {
        const Term & term = plan_->terms()[t];
        if (!term.gated() || !fired(0, t)) {
            continue;
        }
        const auto acts = [&](int64_t position) {
            return !excluded(term, position) && term.scope.factor(position, n_prompt_) != 0.0f;
        };
        if (plan_->acts_before_gate(term) && acts(n_prompt_ - 1)) {
            return true;
        }
        for (int64_t position = 0; position < n_prompt_ - 1 && !term.only_last_block; ++position) {
            if (acts(position)) {
                return true;
            }
        }
    }
    return false;
}

void Sequence::hold() noexcept {
    held_ = true;
    decided_at_.resize(std::min<std::size_t>(decided_at_.size(), 1));
    fired_.resize(std::min(fired_.size(), plan_->terms().size()));
    if (has_gate_) {
        restart();
    }
}

void Sequence::undo_decision() noexcept {
    decided_at_.pop_back();
    fired_.resize(fired_.size() - plan_->terms().size());
    scores_.swap(previous_scores_);
    ranks_.swap(previous_ranks_);
    restart();
}

void Sequence::restart() noexcept {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    std::fill(summed_.begin(), summed_.end(), Sum{});
}

void Sequence::set_excluded(int64_t start, const uint32_t * masks, std::size_t count) {
    excluded_.resize(static_cast<std::size_t>(start) + count, 0);
    std::copy(masks, masks + count, excluded_.begin() + start);
}

}  // namespace pysteer
