#include "hook.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <limits>
#include <utility>

#include "operators.hpp"

namespace pysteer {
namespace {

// Loads and stores one row of a tensor as float32.
class RowAccess {
  public:
    explicit RowAccess(const Tensor * node) : type_(static_cast<FloatType>(node->type)) {}

    bool known() const noexcept {
        return type_ == FloatType::f32 || type_ == FloatType::f16 || type_ == FloatType::bf16;
    }
    std::size_t element_size() const noexcept { return type_ == FloatType::f32 ? 4 : 2; }
    float most() const noexcept { return type_ == FloatType::f16 ? 65504.0f : std::numeric_limits<float>::max(); }

    // The row itself where it is float32, else a copy in `scratch`.
    float * load(char * row, float * scratch, std::size_t width) const noexcept {
        if (type_ == FloatType::f32) {
            return reinterpret_cast<float *>(row);
        }
        const auto * half = reinterpret_cast<const uint16_t *>(row);
        const auto count = static_cast<int64_t>(width);
        if (type_ == FloatType::f16) {
            abi().ggml_fp16_to_fp32_row(half, scratch, count);
        } else {
            abi().ggml_bf16_to_fp32_row(half, scratch, count);
        }
        return scratch;
    }
    void store(char * row, const float * values, std::size_t width) const noexcept {
        auto * half = reinterpret_cast<uint16_t *>(row);
        const auto count = static_cast<int64_t>(width);
        if (type_ == FloatType::f16) {
            abi().ggml_fp32_to_fp16_row(values, half, count);
        } else if (type_ == FloatType::bf16) {
            abi().ggml_fp32_to_bf16_row(values, half, count);
        }
    }

  private:
    FloatType type_;
};

std::string named(Site site, std::size_t layer) {
    return std::string("site ") + site_name(site) + ", layer " + std::to_string(layer);
}

}  // namespace

bool Hook::callback(Tensor * node, bool ask, void * self) noexcept {
    auto & hook = *static_cast<Hook *>(self);
    try {
        if (ask) {
            return hook.wants(node);
        }
        return hook.visit(node);
    } catch (const std::exception & error) {
        hook.fail(error.what());
    } catch (...) {
        hook.fail("unknown exception in the eval callback");
    }
    return !ask;  // after a node was computed: go on, whatever happened; end_decode() reports it
}

void Hook::fail(const std::string & message) noexcept {
    if (error_[0] == '\0') {  // the first cause is the one worth reading
        std::snprintf(error_.data(), error_.size(), "%s", message.c_str());
    }
}

// ---- probe ----------------------------------------------------------------------------------------------------------

void Hook::begin_probe(std::size_t n_layer, std::size_t n_embd) {
    require_idle("probe the model");
    n_layer_ = n_layer;
    n_embd_ = n_embd;
    sites_.emplace(n_layer, n_embd);
    active_.assign(n_sites * n_layer, 0);
    required_.assign(n_sites * n_layer, 0);
    asked_rows_.assign(n_sites * n_layer, 0);
    reached_rows_.assign(n_sites * n_layer, 0);
    resident_written_.assign(n_layer, true);  // they hold the markers now
    zeros_.assign(n_embd, 0.0f);
    row_.assign(n_embd, 0.0f);
    sum_.assign(n_embd, 0.0f);
    error_[0] = '\0';
    probing_ = true;
}

void Hook::end_probe() {
    probing_ = false;
    sites_->learn();
    write_resident(nullptr, 0);
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
}

const std::vector<FoundSite> & Hook::sites() const {
    if (!sites_) {
        throw std::runtime_error("the model has not been probed");
    }
    return sites_->found();
}

// ---- sequences ------------------------------------------------------------------------------------------------------

void Hook::require_idle(const char * what) const {
    if (detached_) {
        throw std::runtime_error(std::string("cannot ") + what + ": the model is closed");
    }
    if (decoding_.load()) {
        throw std::runtime_error(std::string("cannot ") + what + " while a decode is running");
    }
}

void Hook::require_site(Site site, std::size_t layer) const {
    if (!sites_ || sites_->find(site, layer) == nullptr) {
        throw std::invalid_argument("this model's graph has no " + named(site, layer));
    }
}

void Hook::require_host(Site site, std::size_t layer) const {
    const FoundSite * found = sites_->find(site, layer);
    if (found != nullptr && !found->on_host) {
        throw NotOnHost(named(site, layer) + " is in " + found->backend +
                        " memory, which this version cannot hook; the residual of layers >= 1 can be steered there, or "
                        "keep the layers on the CPU with n_gpu_layers=0");
    }
}

void Hook::set_sequence(std::size_t slot, std::shared_ptr<Sequence> sequence) {
    require_idle("change the steering");
    if (sequence) {
        const Plan & plan = sequence->plan();
        if (plan.n_layer() != n_layer_ || plan.n_embd() != n_embd_) {
            throw std::invalid_argument("the plan is for another model");
        }
        for (const Term & term : plan.terms()) {
            for (const std::size_t at : term.places) {
                require_site(static_cast<Site>(at / n_layer_), at % n_layer_);
            }
        }
        if (plan.gate() != nullptr) {
            const Site site = plan.gate()->site();
            for (const Gate::Read & read : plan.gate()->reads()) {
                require_site(site, read.layer);
                if (read.pools && read.layer + 1 == n_layer_ && site != Site::attention) {
                    throw std::invalid_argument("the router looks at several tokens at " + named(site, read.layer) +
                                                ", where llama.cpp computes only the last one");
                }
            }
        }
        factors_.resize(std::max(factors_.size(), plan.terms().size()));
        summed_.resize(factors_.size());
        scratch_.resize(std::max(scratch_.size(), plan.most_rows()));
    }
    if (slot >= slots_.size()) {
        slots_.resize(slot + 1);
    }
    slots_[slot] = std::move(sequence);
}

int64_t Hook::next_decision(std::size_t slot) const noexcept {
    return slot < slots_.size() && slots_[slot] ? slots_[slot]->next_decision() : -1;
}

// ---- decode ---------------------------------------------------------------------------------------------------------

void Hook::begin_decode(const RowRun * runs, std::size_t n_runs) {
    require_idle("decode");
    rows_.clear();
    output_rows_.clear();
    gates_.clear();
    runs_.assign(runs, runs + n_runs);
    decisions_due_ = 0;
    products_ = capture_ != nullptr;
    for (const RowRun & run : runs_) {
        const bool known = run.slot >= 0 && static_cast<std::size_t>(run.slot) < slots_.size();
        Sequence * sequence = known ? slots_[static_cast<std::size_t>(run.slot)].get() : nullptr;
        products_ = products_ || (sequence != nullptr && sequence->plan().uses_products());
        bool reads = false;
        const int64_t decision = sequence != nullptr ? sequence->next_decision() : -1;
        if (decision >= 0 && run.count > 0 && run.position + run.count - 1 > decision) {
            throw std::invalid_argument("the router decides at token " + std::to_string(decision) +
                                        ", which has to be the last of a decode");
        }
        for (int64_t k = 0; k < run.count; ++k) {
            if (run.outputs == RowRun::every || (run.outputs == RowRun::last && k + 1 == run.count)) {
                output_rows_.push_back(static_cast<int32_t>(rows_.size()));
            }
            rows_.push_back({sequence, run.position + k});
            if (sequence != nullptr && sequence->plan().gate() != nullptr) {
                reads = reads || sequence->reads(run.position + k);
                decisions_due_ += sequence->decides(run.position + k) ? 1 : 0;
            }
        }
        if (reads) {
            gates_.push_back(sequence->plan().gate());
        }
    }
    asked_rows_.assign(asked_rows_.size(), 0);
    reached_rows_.assign(reached_rows_.size(), 0);
    tokens_seen_ = 0;
    summed_for_ = nullptr;
    error_[0] = '\0';
    find_active();
    required_ = active_;
    const bool any = std::any_of(active_.begin(), active_.end(), [](uint8_t flag) { return flag != 0; });
    resident_ = any && choose_resident();
    if ((any && !resident_) || !gates_.empty()) {
        require_hooked_places();
    }
    for (const Gate * gate : gates_) {
        for (const Gate::Read & read : gate->reads()) {
            require_host(gate->site(), read.layer);
        }
    }
    write_resident(resident_ ? rows_.front().sequence : nullptr, resident_ ? rows_.front().position : 0);
    busy_ = any || !gates_.empty() || capture_ != nullptr;
    decoding_.store(true);
}

// Where some row may be steered, given what the gates have found so far.
void Hook::find_active() noexcept {
    std::fill(active_.begin(), active_.end(), static_cast<uint8_t>(0));
    std::size_t row = 0;
    for (const RowRun & run : runs_) {
        const Sequence * sequence = rows_.empty() || run.count == 0 ? nullptr : rows_[row].sequence;
        row += static_cast<std::size_t>(run.count);
        if (sequence == nullptr) {
            continue;
        }
        const std::vector<Term> & terms = sequence->plan().terms();
        for (std::size_t t = 0; t < terms.size(); ++t) {
            bool acts = false;
            for (int64_t k = 0; k < run.count && !acts; ++k) {
                acts = sequence->acts(t, run.position + k);
            }
            if (!acts) {
                continue;
            }
            for (const std::size_t at : terms[t].places) {
                active_[at] = 1;
            }
        }
    }
}

bool Hook::choose_resident() {
    const Sequence * first = rows_.front().sequence;
    bool insists = false;
    for (const Row & row : rows_) {
        insists = insists || (row.sequence != nullptr && row.sequence->plan().injection() == Injection::resident);
    }
    // A gate looks at its layers before they are steered, which the resident way would have done already. And nothing
    // sees what the graph adds by itself, so it must not be able to add too much.
    bool can = first != nullptr && first->plan().injection() != Injection::hooked && first->plan().stays_finite() &&
               gates_.empty();
    const auto same = [&](const Row & row) {
        if (row.sequence == nullptr || row.sequence->shared_plan() != first->shared_plan()) {
            return false;
        }
        return first->plan().uniform() || row.sequence->key(row.position) == first->key(rows_.front().position);
    };
    can = can && std::all_of(rows_.begin(), rows_.end(), same);
    if (can) {
        const std::vector<Term> & terms = first->plan().terms();
        for (std::size_t t = 0; t < terms.size(); ++t) {
            const float after = first->factor(t, rows_.front().position, false);
            const float before = first->factor(t, rows_.front().position, true);
            can = can && (before == after) && (after == 0.0f || terms[t].only_control_vector);
        }
    }
    if (insists && !can) {
        throw std::invalid_argument(
            "llama.cpp's control vector holds the same residual of layers >= 1 for all rows, of less than 1e38, and "
            "nothing else");
    }
    return can;
}

// Also those where only the gate's decision would lead.
void Hook::require_hooked_places() const {
    for (std::size_t row = 0, run = 0; run < runs_.size(); row += static_cast<std::size_t>(runs_[run].count), ++run) {
        const Sequence * sequence = runs_[run].count > 0 ? rows_[row].sequence : nullptr;
        if (sequence == nullptr) {
            continue;
        }
        for (const Term & term : sequence->plan().terms()) {
            for (const std::size_t at : term.places) {
                require_host(static_cast<Site>(at / n_layer_), at % n_layer_);
            }
        }
    }
}

// Makes llama.cpp's tensors hold what the row of `like` at a position gets; null: zeros.
void Hook::write_resident(const Sequence * like, int64_t position) {
    const uint64_t key = like != nullptr ? like->key(position) : 0;
    const Plan * plan = like != nullptr ? &like->plan() : nullptr;
    if (resident_plan_.get() == plan && resident_key_ == key && !probing_ && plan != nullptr) {
        return;
    }
    for (std::size_t layer = 1; layer < n_layer_; ++layer) {
        Tensor * tensor = sites_->resident(layer);
        if (tensor == nullptr) {
            continue;
        }
        const std::size_t at = place(Site::residual, layer);
        const bool acts = plan != nullptr && active_[at] != 0;
        if (acts) {
            for (std::size_t k = 0; k < plan->ops(at).size(); ++k) {
                factors_[k] = like->factor(plan->ops(at)[k].term, position, false);
            }
            plan->sum(at, factors_.data(), sum_.data());
        }
        if (acts || resident_written_[layer]) {
            abi().ggml_backend_tensor_set(tensor, acts ? sum_.data() : zeros_.data(), 0, n_embd_ * sizeof(float));
            resident_written_[layer] = acts;
        }
    }
    resident_plan_ = like != nullptr ? like->shared_plan() : nullptr;
    resident_key_ = key;
}

void Hook::abandon_decode() noexcept {
    decoding_.store(false);
    busy_ = false;
}

void Hook::end_decode() {
    abandon_decode();
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            const std::size_t at = place(site, layer);
            if (required_[at] == 0) {
                continue;
            }
            // After the last block's attention llama.cpp keeps only the rows whose logits were asked for.
            const bool last = site != Site::attention && layer + 1 == n_layer_;
            const auto rows = static_cast<int64_t>(last ? output_rows_.size() : rows_.size());
            if (reached_rows_[at] < rows) {
                throw std::runtime_error("steering reached " + std::to_string(reached_rows_[at]) + " of " +
                                         std::to_string(rows) + " tokens at " + named(site, layer));
            }
        }
    }
    if (decisions_due_ > 0) {
        throw std::runtime_error("the router was not reached");
    }
}

bool Hook::reads_at(Site site, std::size_t layer) const noexcept {
    return std::any_of(gates_.begin(), gates_.end(),
                       [&](const Gate * gate) { return gate->site() == site && gate->reads_layer(layer); });
}

bool Hook::wants(Tensor * node) {
    if (probing_) {
        sites_->record(node);
        return false;
    }
    if (!busy_) {
        return false;
    }
    SiteMap::Place found{Site::residual, sites_->residual_layer(node)};
    if (found.layer < 0 && products_) {
        found = sites_->product_place(node);
    }
    if (found.layer < 0) {
        return false;
    }
    const auto layer = static_cast<std::size_t>(found.layer);
    const std::size_t at = place(found.site, layer);
    const int64_t rows = abi().ggml_nrows(node);
    asked_rows_[at] += rows;
    if (layer + 1 < n_layer_) {
        tokens_seen_ = std::max(tokens_seen_, asked_rows_[at]);
    }
    const bool steers = active_[at] != 0;
    if (steers && resident_) {
        // The graph adds the direction by itself; only see that it does.
        if (node->op == abi().op_add && node->src[1] == sites_->resident(layer)) {
            reached_rows_[at] += rows;
        }
    }
    return (steers && !resident_) || captures(found.site, layer) || reads_at(found.site, layer);
}

bool Hook::visit(const Tensor * node) {
    SiteMap::Place found{Site::residual, sites_->residual_layer(node)};
    if (found.layer < 0) {
        found = sites_->product_place(node);
    }
    if (found.layer >= 0 && abi().ggml_nrows(node) > 0) {
        treat(node, found.site, static_cast<std::size_t>(found.layer));
    }
    const bool only_captures = capture_ && gates_.empty() &&
                               std::none_of(active_.begin(), active_.end(), [](uint8_t flag) { return flag != 0; });
    return !only_captures || found.layer < 0 || !capture_->ends_at(found.site, static_cast<std::size_t>(found.layer));
}

int64_t Hook::row_index(Site site, std::size_t layer, int64_t before, int64_t node_rows,
                        int64_t offset) const noexcept {
    const int64_t index = before + offset;
    const auto total = static_cast<int64_t>(rows_.size());
    if (layer + 1 < n_layer_ || site == Site::attention || static_cast<int64_t>(output_rows_.size()) == total) {
        return index < total ? index : -1;
    }
    // The last block: only the rows whose logits are asked for, unless the model computes all the same.
    const auto outputs = static_cast<int64_t>(output_rows_.size());
    if (n_layer_ == 1) {  // no other layer shows how many tokens came by
        return index < outputs ? output_rows_[static_cast<std::size_t>(index)] : -1;
    }
    const int64_t seen = tokens_seen_;
    const int64_t outputs_seen =
        std::lower_bound(output_rows_.begin(), output_rows_.end(), static_cast<int32_t>(seen)) - output_rows_.begin();
    if (before + node_rows == outputs_seen && index < outputs) {
        return output_rows_[static_cast<std::size_t>(index)];
    }
    return before + node_rows == seen && index < total ? index : -1;
}

void Hook::treat(const Tensor * node, Site site, std::size_t layer) {
    const int64_t rows = abi().ggml_nrows(node);
    const RowAccess access(node);
    void * buffer = node->buffer != nullptr || node->view_src == nullptr ? node->buffer : node->view_src->buffer;
    if (buffer == nullptr || !abi().ggml_backend_buffer_is_host(buffer)) {
        return fail(named(site, layer) + " moved to memory that is not on the host");
    }
    if (!access.known()) {
        return fail(named(site, layer) + " has type " + abi().ggml_type_name(node->type) +
                    "; f32, f16 or bf16 expected");
    }
    if (static_cast<std::size_t>(node->ne[0]) != n_embd_ || node->nb[0] != access.element_size()) {
        return fail(named(site, layer) + " is not a contiguous row of " + std::to_string(n_embd_) + " values");
    }
    const std::size_t at = place(site, layer);
    const bool reads = reads_at(site, layer);
    const bool captures_here = captures(site, layer);
    const int64_t before = asked_rows_[at] - rows;
    int64_t offset = 0;
    summed_for_ = nullptr;
    auto * data = static_cast<char *>(node->data);
    for (int64_t i3 = 0; i3 < node->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < node->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < node->ne[1]; ++i1, ++offset) {
                const int64_t index = row_index(site, layer, before, rows, offset);
                if (index < 0) {
                    return fail("cannot tell which token is which row of " + named(site, layer));
                }
                const Row & row = rows_[static_cast<std::size_t>(index)];
                char * bytes = data + static_cast<std::size_t>(i1) * node->nb[1] +
                               static_cast<std::size_t>(i2) * node->nb[2] + static_cast<std::size_t>(i3) * node->nb[3];
                float * values = access.load(bytes, row_.data(), n_embd_);
                if (reads && row.sequence != nullptr && row.sequence->reads(row.position) &&
                    row.sequence->plan().gate()->site() == site && row.sequence->plan().gate()->reads_layer(layer) &&
                    row.sequence->read(layer, row.position, values)) {
                    --decisions_due_;
                    find_active();
                    summed_for_ = nullptr;
                }
                if (active_[at] != 0 && !resident_ && row.sequence != nullptr && steer(row, site, layer, values)) {
                    if (!(largest(values, n_embd_) <= access.most())) {
                        // In the KV cache it would reach every sequence: a weight of 0 times infinity is no number.
                        fail("steering makes the hidden state not finite at " + named(site, layer) +
                             "; lower the strength");
                        std::fill(values, values + n_embd_, 0.0f);
                    }
                    access.store(bytes, values, n_embd_);
                }
                if (captures_here) {  // after steering: what the next block reads
                    capture_->put(site, layer, index, values);
                }
            }
        }
    }
    if (!resident_) {
        reached_rows_[at] += rows;
    }
}

bool Hook::steer(const Row & row, Site site, std::size_t layer, float * values) {
    const Plan & plan = row.sequence->plan();
    const std::vector<Plan::Op> & ops = plan.ops(place(site, layer));
    const bool before_gate = plan.before_gate(site, layer);
    bool any = false;
    bool sums = true;
    for (std::size_t k = 0; k < ops.size(); ++k) {
        factors_[k] = row.sequence->factor(ops[k].term, row.position, before_gate);
        any = any || factors_[k] != 0.0f;
        sums = sums && (factors_[k] == 0.0f || plan.terms()[ops[k].term].op.sums());
    }
    if (!any) {
        return false;
    }
    if (sums) {
        const bool known =
            summed_for_ == row.sequence &&
            std::equal(factors_.begin(), factors_.begin() + static_cast<std::ptrdiff_t>(ops.size()), summed_.begin());
        if (!known) {
            plan.sum(place(site, layer), factors_.data(), sum_.data());
            std::copy(factors_.begin(), factors_.begin() + static_cast<std::ptrdiff_t>(ops.size()), summed_.begin());
            summed_for_ = row.sequence;
        }
        add(values, sum_.data(), n_embd_);
        return true;
    }
    summed_for_ = nullptr;
    bool pending = false;  // additions that follow each other are summed first, as in the resident way
    for (std::size_t k = 0; k <= ops.size(); ++k) {
        const bool end = k == ops.size();
        if (!end && factors_[k] == 0.0f) {
            continue;
        }
        const Operator * op = end ? nullptr : &plan.terms()[ops[k].term].op;
        if (op != nullptr && op->sums()) {
            add_scaled(sum_.data(), !pending, factors_[k], ops[k].rows, n_embd_);
            pending = true;
            continue;
        }
        if (pending) {
            add(values, sum_.data(), n_embd_);
            pending = false;
        }
        if (op != nullptr) {
            apply(*op, ops[k].rows, ops[k].n_rows, factors_[k], values, n_embd_, scratch_.data());
        }
    }
    return true;
}

// ---- capture --------------------------------------------------------------------------------------------------------

void Hook::begin_capture(std::unique_ptr<Capture> capture) {
    require_idle("capture");
    if (capture->n_embd() != n_embd_) {
        throw std::invalid_argument("the capture is for another model");
    }
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            if (capture->wants(site, layer)) {
                require_site(site, layer);
                require_host(site, layer);
            }
        }
    }
    capture_ = std::move(capture);
}

std::unique_ptr<Capture> Hook::end_capture() {
    return std::move(capture_);
}

void Hook::detach() noexcept {
    detached_ = true;
    abandon_decode();
    slots_.clear();
    if (sites_) {
        sites_->forget_resident();
    }
}

}  // namespace pysteer
