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

Sequence::Sequence(std::shared_ptr<const Plan> plan, int64_t n_prompt, int64_t span_start, int64_t span_stop,
                   int64_t n_positions)
    : plan_(std::move(plan)),
      has_gate_(plan_->gate() != nullptr),
      n_prompt_(n_prompt),
      span_start_(span_start),
      span_stop_(span_stop) {
    if (n_prompt < 0 || (has_gate_ && !(0 <= span_start && span_start < span_stop && span_stop <= n_prompt))) {
        throw std::invalid_argument("the router has no token of the prompt to look at");
    }
    if (!has_gate_) {
        return;
    }
    if (!plan_->pools()) {
        span_start_ = n_prompt - 1;
        span_stop_ = n_prompt;
    }
    const int64_t checks = plan_->recheck() > 0 ? n_positions / plan_->recheck() + 2 : 1;
    decided_at_.reserve(static_cast<std::size_t>(checks));
    fired_.reserve(static_cast<std::size_t>(checks) * plan_->terms().size());
    sums_.assign(plan_->n_embd(), 0.0);
    scores_.assign(plan_->gate()->n_rows(), 0.0);
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
        // The last decision before this row is computed here.
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
    if (what.exclude_bit >= 0 && static_cast<std::size_t>(position) < excluded_.size() &&
        ((excluded_[static_cast<std::size_t>(position)] >> what.exclude_bit) & 1u) != 0) {
        return 0.0f;
    }
    return what.strength * what.scope.factor(position, n_prompt_);
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
        if (bits(before) != bits(after)) {  // steered in some layers only: which, depends on where the gate reads
            key = mixed(key ^ graph_order(plan_->gate()->site(), plan_->gate()->layer()));
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
        return false;  // decided already: this token is computed once more
    }
    const int64_t r = response_index(position);
    return r == 0 || (r > 0 && plan_->recheck() > 0 && r % plan_->recheck() == 0);
}

bool Sequence::reads(int64_t position) const noexcept {
    if (!has_gate_ || (!decided_at_.empty() && decided_at_.back() >= position)) {
        return false;
    }
    if (decides(position)) {
        return true;
    }
    if (decided_at_.empty()) {
        return position >= span_start_ && position < span_stop_;
    }
    return plan_->recheck() > 0 && plan_->pools();
}

bool Sequence::read(int64_t position, const float * row) {
    const bool first = decided_at_.empty();
    const bool last_of_prompt = first && position == n_prompt_ - 1;
    const bool counts = first ? position >= span_start_ && position < span_stop_ : plan_->pools() || decides(position);
    if (counts) {
        if (position <= summed_to_) {
            restart();  // the same tokens again
        }
        accumulate(sums_.data(), row, plan_->n_embd());
        ++summed_;
        summed_to_ = position;
    }
    if (!decides(position)) {
        return false;
    }
    if (last_of_prompt && summed_ != span_stop_ - span_start_) {
        throw std::runtime_error("the router saw " + std::to_string(summed_) + " of the " +
                                 std::to_string(span_stop_ - span_start_) + " tokens it looks at");
    }
    decide(position);
    return true;
}

void Sequence::decide(int64_t position) {
    const Gate & gate = *plan_->gate();
    for (double & sum : sums_) {
        sum /= static_cast<double>(summed_);
        if (!std::isfinite(sum)) {
            throw std::runtime_error("the hidden state that the router looks at is not finite");
        }
    }
    gate.scores(sums_.data(), scores_.data());
    for (std::size_t k = 0; k < gate.n_categories(); ++k) {
        const double threshold = plan_->thresholds()[k];
        open_[k] = plan_->above()[k] != 0 ? scores_[k] >= threshold : scores_[k] <= threshold;
    }
    const std::vector<Term> & terms = plan_->terms();
    const std::size_t start = fired_.size();
    std::size_t chosen = terms.size();
    double furthest = 0.0;
    for (std::size_t t = 0; t < terms.size(); ++t) {
        const bool fires = terms[t].gated() && holds(terms[t].rule, open_.data(), stack_.data());
        fired_.push_back(fires ? 1 : 0);
        if (!fires || plan_->several() == Several::sum) {
            continue;
        }
        double past = 0.0;  // how far past its threshold
        if (terms[t].own_gate >= 0) {
            const auto own = static_cast<std::size_t>(terms[t].own_gate);
            past = (scores_[own] - plan_->thresholds()[own]) * (plan_->above()[own] != 0 ? 1.0 : -1.0);
        }
        if (chosen == terms.size() || (plan_->several() == Several::strongest && past > furthest)) {
            chosen = t;
            furthest = past;
        }
    }
    if (plan_->several() != Several::sum) {
        for (std::size_t t = 0; t < terms.size(); ++t) {
            fired_[start + t] = t == chosen ? 1 : 0;
        }
    }
    decided_at_.push_back(position);
    restart();
}

bool Sequence::wants_reprocess() const noexcept {
    if (held_ || decided_at_.empty()) {
        return false;
    }
    for (std::size_t t = 0; t < plan_->terms().size(); ++t) {
        const Term & term = plan_->terms()[t];
        if (!term.gated() || term.only_last_block || !fired(0, t)) {
            continue;
        }
        for (int64_t position = 0; position < n_prompt_ - 1; ++position) {
            const bool excluded = term.exclude_bit >= 0 && static_cast<std::size_t>(position) < excluded_.size() &&
                                  ((excluded_[static_cast<std::size_t>(position)] >> term.exclude_bit) & 1u) != 0;
            if (!excluded && term.scope.factor(position, n_prompt_) != 0.0f) {
                return true;
            }
        }
    }
    return false;
}

void Sequence::restart() noexcept {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    summed_ = 0;
    summed_to_ = -1;
}

void Sequence::set_excluded(int64_t start, const uint32_t * masks, std::size_t count) {
    excluded_.resize(static_cast<std::size_t>(start) + count, 0);
    std::copy(masks, masks + count, excluded_.begin() + start);
}

}  // namespace pysteer
