// The rows of the batch that a node holds, and their count so far.
//
// llama.cpp runs a graph for each micro-batch, with rows in the order of the batch. In the last block a model keeps
// only the rows with logits, or all rows: the number of rows tells which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "batch.hpp"
#include "site.hpp"

namespace pysteer {

// Indices of batch rows: consecutive, or from a table.
class RowIndices {
  public:
    RowIndices(const int32_t * table, int64_t first) noexcept : table_(table), first_(first) {}
    int64_t operator[](int64_t k) const noexcept { return table_ != nullptr ? table_[k] : first_ + k; }

  private:
    const int32_t * table_;
    int64_t first_;
};

// True if llama.cpp computes a place for every row; after the attention of the last block, only rows with logits are
// computed.
inline bool keeps_every_row(Place place, std::size_t n_layer) noexcept {
    return place.layer + 1 < n_layer || place.site == Site::attention;
}

class RowMap {
  public:
    // Makes room for a model.
    void resize(std::size_t n_layer);
    // Starts a decode, in which every row has to be reached at the places that are flagged (by place_index()). The
    // batch must not change before the decode ends.
    void begin(const Batch & batch, const std::vector<uint8_t> & required);

    // The next node at a place has so many rows.
    void pass(Place place, int64_t n_rows) noexcept;
    // The batch rows of the node that passed last; nullopt if the number of rows does not tell.
    std::optional<RowIndices> rows_of(Place place, int64_t node_rows) const noexcept;
    // So many rows of the place were steered, or checked and left alone.
    void reach(Place place, int64_t n_rows) noexcept;

    // The number of rows of the decode that came by; 0 for models of one block.
    int64_t tokens_passed() const noexcept { return tokens_passed_; }
    // Throws std::runtime_error if a required place did not see every row.
    void require_all_reached() const;

  private:
    int64_t outputs_passed() const noexcept;
    int64_t n_rows() const noexcept { return static_cast<int64_t>(batch_->rows().size()); }
    int64_t n_outputs() const noexcept { return static_cast<int64_t>(batch_->output_rows().size()); }

    std::size_t n_layer_ = 0;
    const Batch * batch_ = nullptr;
    std::vector<uint8_t> required_;  // by place
    std::vector<int64_t> passed_;    // by place: rows of the nodes that came by
    std::vector<int64_t> reached_;   // by place
    int64_t tokens_passed_ = 0;      // rows that came by in the blocks before the last
};

}  // namespace pysteer
