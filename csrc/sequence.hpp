// A plan at work on one sequence of tokens: the decisions of its gate, and the factor of every token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan.hpp"

namespace pysteer {

// For one thread at a time. The constructor and set_excluded() take all memory; the functions that the callback calls
// only write.
class Sequence {
  public:
    struct Span {
        int64_t start;
        int64_t stop;
        bool holds(int64_t position) const noexcept { return position >= start && position < stop; }
    };

    // n_prompt: tokens of the prompt. spans: for each read of the gate the prompt tokens that it averages over; a read
    // that does not pool takes the last prompt token. n_positions: the most tokens that the sequence can have. Throws
    // std::invalid_argument for a wrong number of spans, or a span that is empty or outside the prompt. Without a gate
    // the spans are ignored.
    Sequence(std::shared_ptr<const Plan> plan, int64_t n_prompt, std::vector<Span> spans, int64_t n_positions);

    // The gate reads none of these prompt positions, which hold an image. Call before the first decode.
    void leave_out(Span span) { left_out_.push_back(span); }

    const Plan & plan() const noexcept { return *plan_; }
    const std::shared_ptr<const Plan> & shared_plan() const noexcept { return plan_; }

    // The factor of a term's directions for the token at a position, at places before or after the gate decides.
    float factor(std::size_t term, int64_t position, bool before_gate) const noexcept;
    // True if a term acts on the token anywhere.
    bool acts(std::size_t term, int64_t position) const noexcept {
        return factor(term, position, false) != 0.0f || (has_gate_ && factor(term, position, true) != 0.0f);
    }
    // A fingerprint of the steering of one token: equal for equal steering, 0 for none. cached: of the part that the KV
    // cache depends on. Keys and values are computed from the outputs of earlier blocks, so terms of the last block
    // alone are left out.
    uint64_t key(int64_t position, bool cached = false) const noexcept;
    // The number of the first n_tokens tokens that a term, or any term, acts on.
    int64_t tokens_steered(std::size_t term, int64_t n_tokens) const noexcept;
    int64_t tokens_steered(int64_t n_tokens) const noexcept;

    // True if the gate reads the row of a token at some layer, or at a place, or decides at that token.
    bool reads(int64_t position) const noexcept;
    bool reads_at(Place place, int64_t position) const noexcept;
    bool decides(int64_t position) const noexcept;
    // The position where the gate decides next; -1: never.
    int64_t next_decision() const noexcept;
    // Takes the row at a place if the gate reads it; returns true if a decision was made. Throws std::runtime_error for
    // rows that are not finite, and if the gate missed tokens of a span.
    bool read(Place place, int64_t position, const float * row);

    // True if a term fired that steers prompt tokens already computed without the term: those before the last prompt
    // token, or the last at places before the gate.
    bool wants_reprocess() const noexcept;
    // Makes the first decision hold from the first token on, for a prompt that is processed again. Forgets later
    // decisions: the rows that they read change.
    void hold() noexcept;
    // Takes back the last decision, and the reads since: the decode that made it failed. Only once for each decision.
    void undo_decision() noexcept;
    // Evaluation starts again: forgets the sums of the reads since the last decision.
    void restart() noexcept;

    // Sets the masks of tokens from `start` on: one bit for each pair of markers that a token stands between.
    void set_excluded(int64_t start, const uint32_t * masks, std::size_t count);

    std::size_t n_decisions() const noexcept { return decided_at_.size(); }
    int64_t decided_at(std::size_t decision) const noexcept { return decided_at_[decision]; }
    bool fired(std::size_t decision, std::size_t term) const noexcept {
        return fired_[decision * plan_->terms().size() + term] != 0;
    }
    bool held() const noexcept { return held_; }
    // Of the last decision; n_categories() values.
    const double * scores() const noexcept { return scores_.data(); }
    const double * ranks() const noexcept { return ranks_.data(); }

  private:
    // The rows in the sum of a read since the last decision.
    struct Sum {
        int64_t count = 0;
        int64_t to = -1;  // the last position
    };

    bool counts(std::size_t read, int64_t position) const noexcept;
    // The number of prompt positions that a read takes.
    int64_t due(std::size_t read) const noexcept;
    void accumulate_row(std::size_t read, int64_t position, const float * row) noexcept;
    void decide(int64_t position);
    void open_gates() noexcept;
    void fire_terms();
    // How far a term's own gate is past its threshold; 0 without such a gate.
    double excess(const Term & term) const noexcept;
    bool excluded(const Term & term, int64_t position) const noexcept;
    int64_t response_index(int64_t position) const noexcept { return position - (n_prompt_ - 1); }

    std::shared_ptr<const Plan> plan_;
    bool has_gate_;
    int64_t n_prompt_;
    bool held_ = false;
    std::vector<uint32_t> excluded_;   // masks by position
    std::vector<int64_t> decided_at_;  // ascending positions
    std::vector<uint8_t> fired_;       // by decision and term
    std::vector<Span> spans_;          // by read
    std::vector<Span> left_out_;       // prompt positions that no read takes
    std::vector<Sum> summed_;          // by read
    std::vector<double> sums_;         // by read, n_embd values each
    std::vector<double> scores_;
    std::vector<double> ranks_;
    std::vector<double> previous_scores_;  // of the decision before the last
    std::vector<double> previous_ranks_;
    std::vector<uint8_t> open_;   // by gate, while deciding
    std::vector<uint8_t> stack_;  // for rules, while deciding
};

}  // namespace pysteer
