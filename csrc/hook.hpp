// The eval callback of one llama_context: finds the sites, applies the plan, captures, and keeps account of what it
// did.
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
#include "sites.hpp"

namespace pysteer {

// A tensor lives in memory that the host cannot reach.
struct NotOnHost : std::runtime_error {
    using std::runtime_error::runtime_error;
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

    // What every later decode does; null is nothing. Resident: the plan is written into llama.cpp's control-vector
    // tensors. Throws std::invalid_argument for a plan of another shape, for a site that the model lacks or a resident
    // plan that llama.cpp's tensors cannot hold, NotOnHost for a hooked plan on a tensor that is not in host memory,
    // and std::runtime_error after detach() or during a decode. On a throw the former plan stays in force.
    void set_plan(std::shared_ptr<const Plan> plan, bool resident);

    // Around every llama_decode, or several of one evaluation. end_decode() throws std::runtime_error if the callback
    // met something it cannot handle, or if a site of the plan saw fewer rows than tokens_decoded (the last residual:
    // none).
    void begin_decode();
    void end_decode(int64_t tokens_decoded);
    // Ends the bracket without checks, after a decode that failed.
    void abandon_decode() noexcept;

    // From now until end_capture(), decodes are captured, and without a plan each graph ends with the last site that
    // the capture wants: whatever is computed from it, logits among it, is then left undefined. Same exceptions as
    // set_plan().
    void begin_capture(std::unique_ptr<Capture> capture);
    std::unique_ptr<Capture> end_capture();

    // The llama_context is about to be freed: touch none of its tensors any more.
    void detach() noexcept;

  private:
    bool wants(Tensor * node);
    // Steers and captures; returns whether the graph has anything left that is wanted.
    bool visit(const Tensor * node);
    void treat(const Tensor * node, Site site, std::size_t layer);
    void require_idle(const char * what) const;
    void require_site(Site site, std::size_t layer, bool must_be_on_host) const;
    void fail(const std::string & message) noexcept;
    bool steers(Site site, std::size_t layer) const noexcept;
    bool captures(Site site, std::size_t layer) const noexcept;
    int64_t & steered_rows(Site site, std::size_t layer) noexcept;
    int64_t & seen_rows(Site site, std::size_t layer) noexcept;
    void write_resident(const Plan * plan);

    std::size_t n_layer_ = 0;
    std::size_t n_embd_ = 0;
    std::optional<SiteMap> sites_;
    std::shared_ptr<const Plan> plan_;
    bool resident_ = false;
    std::unique_ptr<Capture> capture_;
    bool probing_ = false;
    bool detached_ = false;
    std::atomic<bool> decoding_{false};

    std::vector<int64_t> steered_rows_;   // per site and layer, in this bracket
    std::vector<int64_t> seen_rows_;      // the same, for capture
    std::vector<bool> resident_written_;  // layers whose control-vector tensor is not zero
    std::vector<float> zeros_;
    std::vector<float> row_;  // one row as float32, for 16-bit activations
    std::array<char, 256> error_{};
};

}  // namespace pysteer
