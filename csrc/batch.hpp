// The rows of a decode: their tokens and sequences, the places where plans act, and the gates that read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan.hpp"
#include "sequence.hpp"

namespace pysteer {

// Rows of a batch that follow each other in one sequence.
struct RowRun {
    enum Outputs : int32_t { none = 0, last = 1, every = 2 };
    int32_t slot;      // the sequence's number in llama.cpp's batch
    int64_t position;  // of the first token
    int64_t count;
    int32_t outputs;  // the rows with logits
};

struct Row {
    Sequence * sequence;  // null: not steered
    int64_t position;
};

class Batch {
  public:
    // Makes room for a model; forgets the rows.
    void resize(std::size_t n_layer);

    // Takes the rows of a decode. `slots` are the sequences by their number. Throws std::invalid_argument for rows
    // beyond a gate's next decision.
    void assign(const RowRun * runs, std::size_t n_runs, const std::vector<std::shared_ptr<Sequence>> & slots);

    // Takes rows that a foreign caller of llama.cpp may decode: at most run.count rows without logits, of a prompt's
    // next n_positions positions, the last of which all further rows share. No gate reads them.
    void assign_foreign(const RowRun & run, int64_t n_positions, const std::vector<std::shared_ptr<Sequence>> & slots);
    // Drops the rows after the first n_rows.
    void truncate(std::size_t n_rows) noexcept { rows_.resize(std::min(n_rows, rows_.size())); }

    const std::vector<Row> & rows() const noexcept { return rows_; }
    // Indices of the rows with logits, ascending.
    const std::vector<int32_t> & output_rows() const noexcept { return output_rows_; }
    // The gates that read some row.
    const std::vector<const Gate *> & gates() const noexcept { return gates_; }
    bool reads_at(Place place) const noexcept;
    // True if a plan uses the sites attention or mlp.
    bool uses_products() const noexcept { return uses_products_; }

    // Flags by place_index(): some row may be steered there, given the decisions so far.
    const std::vector<uint8_t> & active() const noexcept { return active_; }
    bool active_at(Place place) const noexcept { return active_[place_index(place, n_layer_)] != 0; }
    bool any_active() const noexcept;

    // Finds the active places anew after a gate's decision.
    void take_decision() noexcept;
    int64_t decisions_due() const noexcept { return decisions_due_; }

  private:
    void clear() noexcept;
    void add_run(const RowRun & run, Sequence * sequence);
    void find_active() noexcept;
    // Calls visit(sequence, run) for each run of a steered sequence.
    template <typename Visit>
    void for_each_steered(Visit && visit) const;

    std::size_t n_layer_ = 0;
    std::vector<RowRun> runs_;
    std::vector<Row> rows_;
    std::vector<int32_t> output_rows_;
    std::vector<const Gate *> gates_;
    std::vector<uint8_t> active_;
    int64_t decisions_due_ = 0;
    bool uses_products_ = false;
};

}  // namespace pysteer
