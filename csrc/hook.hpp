// The eval callback of one llama_context: finds the sites, has each row steered, read and captured, and keeps account.
//
// llama.cpp calls the callback on the thread that decodes. Everything else here is called between decodes, by one
// thread at a time.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "batch.hpp"
#include "capture.hpp"
#include "llama_abi.hpp"
#include "plan.hpp"
#include "resident.hpp"
#include "row_access.hpp"
#include "row_map.hpp"
#include "row_tables.hpp"
#include "sequence.hpp"
#include "sites.hpp"
#include "steer.hpp"

namespace pysteer {

class Hook {
  public:
    Hook() = default;
    Hook(const Hook &) = delete;
    Hook & operator=(const Hook &) = delete;

    // llama_context_params.cb_eval, with the Hook as its user data.
    static bool callback(Tensor * node, bool ask, void * self) noexcept;

    // Probe: between the two, one decode on the new context while every control-vector tensor of layer N holds the
    // value N in all its elements; `n_tokens` is the number of tokens that it decodes. Afterwards the tensors are zero
    // and the sites are known.
    void begin_probe(std::size_t n_layer, std::size_t n_embd, int64_t n_tokens);
    void end_probe();
    const std::vector<SiteNode> & sites() const;

    // Steers the sequence with this number from the next decode on; null ends its steering. Throws
    // std::invalid_argument for a plan of another shape or for a site that the model lacks, and std::runtime_error
    // after detach() or during a decode.
    void set_sequence(std::size_t slot, std::shared_ptr<Sequence> sequence);

    // The position where the gate of the sequence with this number decides next; -1: never. That token must be the last
    // of its bracket of begin_decode() and end_decode(): the lower layers of later tokens would be computed before the
    // gate decides about them.
    int64_t next_decision(std::size_t slot) const noexcept;

    // Around every llama_decode, or several of one evaluation, whose rows come in this order. begin_decode() chooses
    // the injection: where every row gets the same additions to the residual of layers >= 1, they are
    // written into llama.cpp's control-vector tensors and the graph runs uncut. Throws std::invalid_argument for a
    // plan that insists on the control vector where that cannot express it, and for rows beyond the next decision.
    // end_decode() throws std::runtime_error if the callback met an unsupported node, or if a place that had to be
    // steered or read did not get every row.
    void begin_decode(const RowRun * runs, std::size_t n_runs);
    void end_decode();
    // Around llama_decode calls of a foreign caller, such as an image's: at most n_rows rows without logits, at the
    // next n_positions positions of a sequence's prompt; rows beyond share the last position. end_foreign() returns the
    // number of rows that came, and throws as end_decode() does.
    void begin_foreign(std::size_t slot, int64_t position, int64_t n_rows, int64_t n_positions);
    int64_t end_foreign();
    // Ends the bracket without checks, after a decode that failed.
    void abandon_decode() noexcept;
    // True if the last decode was steered through llama.cpp's control-vector tensors.
    bool was_resident() const noexcept { return is_resident_; }
    // The number of nodes after which the last decode cut the graph.
    std::size_t cuts() const noexcept { return cuts_; }

    // From now until end_capture(), decodes are captured. Where nothing is steered each graph ends with the last place
    // that the capture wants, and later values, logits included, are undefined. Throws as set_sequence() does.
    void begin_capture(std::unique_ptr<Capture> capture);
    std::unique_ptr<Capture> end_capture();

    // Ends all use of the llama_context's tensors; call before the context is freed.
    void detach() noexcept;

  private:
    // The two calls of the callback. wants() returns true to cut the graph after the node, visit() returns true if the
    // rest of the graph is needed.
    bool wants(Tensor * node);
    bool visit(Tensor * node);
    void fail(const std::string & message) noexcept;

    // The work on the rows of a node.
    struct Work {
        Place place;
        bool reads;
        bool captures;
        float limit;  // the largest absolute value that a row can hold
    };
    void treat(Tensor * node, Place place);
    // Reads, steers and captures a row of the batch; returns true if its values changed.
    bool treat_row(const Work & work, std::size_t index, float * values);
    bool captures(Place place) const noexcept { return capture_ && capture_->wants(place); }
    // True if the decode ends with the capture: nothing is steered or read.
    bool only_captures() const noexcept { return capture_ && batch_.gates().empty() && !batch_.any_active(); }
    // True for a place that the decode steers through its control vector, if at all.
    bool by_vector(Place place) const noexcept {
        return is_resident_ && place.site == Site::residual && sites_->resident(place.layer) != nullptr;
    }
    // Has a node add a direction to each of its rows by itself, if the node can do all that its rows need.
    bool steers_by_table(Tensor * node, Place place);
    // The row of the current table for a row of the batch; nullopt if a table cannot do what the row needs.
    std::optional<int32_t> table_row(const Row & row, Place place);
    // The batch rows of a node; nullopt if its shape does not tell.
    std::optional<RowIndices> rows_of(const Tensor * node, Place place) const noexcept;
    // True if some row of a node is steered by the hook, read or captured, or the rows cannot be told.
    bool touches(const Tensor * node, Place place) const noexcept;
    // True for a row of the batch; in streams after the first, tokens are steered alone.
    bool touches_row(Place place, std::size_t index, bool first_stream) const noexcept;

    void require_idle(const char * action) const;
    void require_place(Place place) const;
    void require_fit(const Plan & plan) const;
    void begin();  // with the rows of batch_

    std::size_t n_layer_ = 0;
    std::size_t n_embd_ = 0;
    std::optional<SiteMap> sites_;
    std::vector<std::shared_ptr<Sequence>> slots_;
    std::unique_ptr<Capture> capture_;
    ResidentVectors resident_;
    bool probing_ = false;
    bool detached_ = false;
    std::atomic<bool> decoding_{false};

    // Of the decode under way.
    Batch batch_;
    RowMap row_map_;
    bool is_resident_ = false;
    bool busy_ = false;  // something is steered, read or captured
    std::size_t cuts_ = 0;

    Steerer steerer_;
    std::vector<float> row_;  // one row as float32, for 16-bit activations
    RowCopies copies_;
    RowTables tables_;
    std::vector<int32_t> ids_;  // table rows of a node's rows
    std::array<char, 256> error_{};
};

}  // namespace pysteer
