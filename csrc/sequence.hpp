// The steering of one sequence of tokens: its plan, what the gate found, and what follows for every token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan.hpp"

namespace pysteer {

// Used by one thread at a time. All memory is taken in the constructor and by set_excluded(); what the callback calls
// only writes.
class Sequence {
  public:
    struct Span {
        int64_t start;
        int64_t stop;
        bool holds(int64_t position) const noexcept { return position >= start && position < stop; }
    };

    // n_prompt: tokens of the prompt. spans: for each read of the gate those tokens whose mean it looks at, all of them
    // prompt tokens; a read that does not pool looks at the last one. n_positions: the most tokens the sequence can
    // have. Throws std::invalid_argument for another number of spans, or one that is empty or outside the prompt; where
    // nothing is gated the spans do not count.
    Sequence(std::shared_ptr<const Plan> plan, int64_t n_prompt, std::vector<Span> spans, int64_t n_positions);

    const Plan & plan() const noexcept { return *plan_; }
    const std::shared_ptr<const Plan> & shared_plan() const noexcept { return plan_; }

    // What a term's direction is multiplied by for the token at a position, at a place before or after the gate reads.
    float factor(std::size_t term, int64_t position, bool before_gate) const noexcept;
    // Whether a term acts on the token anywhere.
    bool acts(std::size_t term, int64_t position) const noexcept {
        return factor(term, position, false) != 0.0f || (has_gate_ && factor(term, position, true) != 0.0f);
    }
    // A fingerprint of the steering of one token: equal where it is equal, 0 where there is none. cached: as far as the
    // KV cache depends on it. Keys and values are computed from the outputs of earlier blocks, so what acts in the last
    // block alone is not part of it.
    uint64_t key(int64_t position, bool cached = false) const noexcept;
    // How many of the first n_tokens tokens the term acts on.
    int64_t tokens_steered(std::size_t term, int64_t n_tokens) const noexcept;
    // The same for any of the terms.
    int64_t tokens_steered(int64_t n_tokens) const noexcept;

    // Whether the gate looks at the token's row at some layer, or decides there.
    bool reads(int64_t position) const noexcept;
    bool decides(int64_t position) const noexcept;
    // The position where the gate decides next, if it goes on to there; -1 if it does not decide any more.
    int64_t next_decision() const noexcept;
    // Takes the row at a place if the gate reads it; returns whether a decision was made. Throws std::runtime_error for
    // rows that are not finite, and where the gate has not seen a whole span.
    bool read(Place place, int64_t position, const float * row);

    // Whether a category fired that steers prompt tokens which have been computed without: those before the last one,
    // or the last one at places before the gate.
    bool wants_reprocess() const noexcept;
    // Makes the first decision hold from the first token on, for a prompt that is processed once more. Later decisions
    // are forgotten: what they looked at changes.
    void hold() noexcept;
    // Evaluation starts again: what the reads summed up since the last decision is forgotten.
    void restart() noexcept;

    // One bit for each pair of markers: tokens from `start` on that stand between them.
    void set_excluded(int64_t start, const uint32_t * masks, std::size_t count);

    std::size_t n_decisions() const noexcept { return decided_at_.size(); }
    int64_t decided_at(std::size_t decision) const noexcept { return decided_at_[decision]; }
    bool fired(std::size_t decision, std::size_t term) const noexcept {
        return fired_[decision * plan_->terms().size() + term] != 0;
    }
    bool held() const noexcept { return held_; }
    // Of the last decision; n_categories() of the gate.
    const double * scores() const noexcept { return scores_.data(); }
    const double * ranks() const noexcept { return ranks_.data(); }

  private:
    // What a read has summed up since the last decision.
    struct Sum {
        int64_t count = 0;
        int64_t to = -1;  // the last position
    };

    bool counts(std::size_t read, int64_t position) const noexcept;
    void accumulate_row(std::size_t read, int64_t position, const float * row) noexcept;
    void decide(int64_t position);
    bool excluded(const Term & term, int64_t position) const noexcept;
    int64_t response_index(int64_t position) const noexcept { return position - (n_prompt_ - 1); }

    std::shared_ptr<const Plan> plan_;
    bool has_gate_;
    int64_t n_prompt_;
    bool held_ = false;
    std::vector<uint32_t> excluded_;   // per position
    std::vector<int64_t> decided_at_;  // ascending positions
    std::vector<uint8_t> fired_;       // per decision and term
    std::vector<Span> spans_;          // per read
    std::vector<Sum> summed_;          // per read
    std::vector<double> sums_;         // per read n_embd values
    std::vector<double> scores_;
    std::vector<double> ranks_;
    std::vector<uint8_t> open_;   // per gate, while deciding
    std::vector<uint8_t> stack_;  // of the rule, while deciding
};

}  // namespace pysteer
