// The eval callback of one llama_context: finds the sites, steers each sequence's rows by its own plan, reads what the
// gates look at, captures, and keeps account of what it did.
//
// llama.cpp calls it on the thread that decodes. Everything else here is called between decodes, by one thread at a
// time.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "capture.hpp"
#include "llama_abi.hpp"
#include "plan.hpp"
#include "sequence.hpp"
#include "sites.hpp"

namespace pysteer {

// A tensor lives in memory that the host cannot reach.
struct NotOnHost : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Rows of a batch that follow each other in one sequence.
struct RowRun {
    enum Outputs : int32_t { none = 0, last = 1, every = 2 };
    int32_t slot;      // the sequence's number in llama.cpp's batch
    int64_t position;  // of the first token
    int64_t count;
    int32_t outputs;  // whose logits are asked for
};

class Hook {
  public:
    Hook() = default;
    Hook(const Hook &) = delete;
    Hook & operator=(const Hook &) = delete;

    // llama_context_params.cb_eval, with the Hook as its user data.
    static bool callback(Tensor * node, bool ask, void * self) noexcept;

    // Probe: between the two, one decode on the new context while every control-vector tensor of layer N holds the
    // value N in all its elements. Afterwards the tensors are zero and the sites are known.
    void begin_probe(std::size_t n_layer, std::size_t n_embd);
    void end_probe();
    const std::vector<FoundSite> & sites() const;

    // How the sequence with this number is steered from the next decode on; null is not at all. Throws
    // std::invalid_argument for a plan of another shape or for a site that the model lacks, and std::runtime_error
    // after detach() or during a decode.
    void set_sequence(std::size_t slot, std::shared_ptr<Sequence> sequence);

    // The position where the gate of the sequence with this number decides next; -1 if it does not. No row beyond it
    // can be in the same bracket of begin_decode() and end_decode(): the graph has computed it at the lower layers when
    // the gate decides what happens there.
    int64_t next_decision(std::size_t slot) const noexcept;

    // Around every llama_decode, or several of one evaluation, whose rows come in this order. begin_decode() decides
    // which way the directions get in: where every row gets the same additions to the residual of layers >= 1, they are
    // written into llama.cpp's control-vector tensors and the graph runs uncut. It throws NotOnHost for what has to be
    // hooked but is not in host memory, and std::invalid_argument for a plan that insists on the resident way where
    // that cannot express it, and for rows beyond the next decision. end_decode() throws std::runtime_error if the
    // callback met something it cannot handle, or if a site that had to be steered or read did not see every row.
    void begin_decode(const RowRun * runs, std::size_t n_runs);
    void end_decode();
    // Ends the bracket without checks, after a decode that failed.
    void abandon_decode() noexcept;
    // Whether the last decode was steered through llama.cpp's control-vector tensors.
    bool was_resident() const noexcept { return resident_; }

    // From now until end_capture(), decodes are captured, and where nothing is steered each graph ends with the last
    // site that the capture wants: whatever is computed from it, logits among it, is then left undefined. Throws as
    // set_sequence() does, and NotOnHost.
    void begin_capture(std::unique_ptr<Capture> capture);
    std::unique_ptr<Capture> end_capture();

    // The llama_context is about to be freed: touch none of its tensors any more.
    void detach() noexcept;

  private:
    struct Row {
        Sequence * sequence;
        int64_t position;
    };

    bool wants(Tensor * node);
    // Steers, reads and captures; returns whether the graph has anything left that is wanted.
    bool visit(const Tensor * node);
    void treat(const Tensor * node, Site site, std::size_t layer);
    // Steers one row; returns whether it changed.
    bool steer(const Row & row, Site site, std::size_t layer, float * values);
    void require_idle(const char * what) const;
    void require_site(Site site, std::size_t layer) const;
    void require_host(Site site, std::size_t layer) const;
    void fail(const std::string & message) noexcept;

    void find_active() noexcept;
    bool choose_resident();
    void require_hooked_places() const;
    void write_resident(const Sequence * like, int64_t position);
    // Index into rows_ of the row after `before` others at a place; -1 if it cannot be told.
    int64_t row_index(Site site, std::size_t layer, int64_t before, int64_t node_rows, int64_t offset) const noexcept;
    bool reads_at(Site site, std::size_t layer) const noexcept;
    bool captures(Site site, std::size_t layer) const noexcept { return capture_ && capture_->wants(site, layer); }
    std::size_t place(Site site, std::size_t layer) const noexcept { return place_of(site, layer, n_layer_); }

    std::size_t n_layer_ = 0;
    std::size_t n_embd_ = 0;
    std::optional<SiteMap> sites_;
    std::vector<std::shared_ptr<Sequence>> slots_;
    std::unique_ptr<Capture> capture_;
    bool probing_ = false;
    bool detached_ = false;
    std::atomic<bool> decoding_{false};

    // Of the decode under way.
    std::vector<Row> rows_;
    std::vector<int32_t> output_rows_;  // indices of rows whose logits are asked for, ascending
    std::vector<RowRun> runs_;
    std::vector<const Gate *> gates_;    // those that have something to read
    std::vector<uint8_t> active_;        // per place: some row may be steered there
    std::vector<uint8_t> required_;      // the same at the start: every row has to be seen there
    std::vector<int64_t> asked_rows_;    // per place: rows of the nodes that came by
    std::vector<int64_t> reached_rows_;  // per place: rows that were steered, or looked at for it
    int64_t decisions_due_ = 0;
    int64_t tokens_seen_ = 0;  // rows that came by at the layers before the last
    bool resident_ = false;
    bool busy_ = false;
    bool products_ = false;  // whether the sites attention and mlp matter

    // What llama.cpp's control-vector tensors hold: null and 0 is zeros.
    std::shared_ptr<const Plan> resident_plan_;
    uint64_t resident_key_ = 0;
    std::vector<bool> resident_written_;  // layers whose tensor is not zero
    std::vector<float> zeros_;
    std::vector<float> row_;       // one row as float32, for 16-bit activations
    std::vector<float> sum_;       // what is added to a row
    std::vector<float> factors_;   // of the ops at a place, for one row
    std::vector<float> summed_;    // those that sum_ was made with
    std::vector<double> scratch_;  // for low-rank maps
    const Sequence * summed_for_ = nullptr;
    std::array<char, 256> error_{};
};

}  // namespace pysteer
