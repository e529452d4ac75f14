#include "hook.hpp"

#include <cstdio>
#include <exception>
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

std::string place(Site site, std::size_t layer) {
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
    steered_rows_.assign(n_sites * n_layer, 0);
    seen_rows_.assign(n_sites * n_layer, 0);
    resident_written_.assign(n_layer, true);  // they hold the markers now
    zeros_.assign(n_embd, 0.0f);
    row_.assign(n_embd, 0.0f);
    error_[0] = '\0';
    probing_ = true;
}

void Hook::end_probe() {
    probing_ = false;
    sites_->learn();
    write_resident(nullptr);
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

// ---- plan -----------------------------------------------------------------------------------------------------------

void Hook::require_idle(const char * what) const {
    if (detached_) {
        throw std::runtime_error(std::string("cannot ") + what + ": the model is closed");
    }
    if (decoding_.load()) {
        throw std::runtime_error(std::string("cannot ") + what + " while a decode is running");
    }
}

void Hook::require_site(Site site, std::size_t layer, bool must_be_on_host) const {
    const FoundSite * found = sites_ ? sites_->find(site, layer) : nullptr;
    if (found == nullptr) {
        throw std::invalid_argument("this model's graph has no " + place(site, layer));
    }
    if (must_be_on_host && !found->on_host) {
        throw NotOnHost(place(site, layer) + " is in " + found->backend +
                        " memory, which this version cannot hook; the residual of layers >= 1 can be steered there, or "
                        "keep the layers on the CPU with n_gpu_layers=0");
    }
}

void Hook::set_plan(std::shared_ptr<const Plan> plan, bool resident) {
    require_idle("change the steering");
    if (plan && plan->empty()) {
        plan.reset();
    }
    if (plan) {
        if (plan->n_layer() != n_layer_ || plan->n_embd() != n_embd_) {
            throw std::invalid_argument("the plan is for another model");
        }
        if (resident && !plan->fits_resident()) {
            throw std::invalid_argument("llama.cpp's control vector holds the residual of layers >= 1 only");
        }
        if (!resident && !plan->fits_hooked()) {
            throw std::invalid_argument("the plan has not kept its sums, which the hooked way adds");
        }
        for (const Site site : all_sites) {
            for (std::size_t layer = 0; layer < n_layer_; ++layer) {
                if (plan->acts(site, layer)) {
                    require_site(site, layer, !resident);
                }
            }
        }
    }
    write_resident(resident ? plan.get() : nullptr);
    plan_ = std::move(plan);
    resident_ = resident;
}

void Hook::write_resident(const Plan * plan) {
    for (std::size_t layer = 1; layer < n_layer_; ++layer) {
        Tensor * tensor = sites_->resident(layer);
        if (tensor == nullptr) {
            continue;
        }
        const bool acts = plan != nullptr && plan->acts(Site::residual, layer);
        if (acts) {
            plan->sum(Site::residual, layer, row_.data());
        }
        if (acts || resident_written_[layer]) {
            abi().ggml_backend_tensor_set(tensor, acts ? row_.data() : zeros_.data(), 0, n_embd_ * sizeof(float));
            resident_written_[layer] = acts;
        }
    }
}

bool Hook::steers(Site site, std::size_t layer) const noexcept {
    return plan_ && plan_->acts(site, layer);
}

bool Hook::captures(Site site, std::size_t layer) const noexcept {
    return capture_ && capture_->wants(site, layer);
}

int64_t & Hook::steered_rows(Site site, std::size_t layer) noexcept {
    return steered_rows_[static_cast<std::size_t>(site) * n_layer_ + layer];
}

int64_t & Hook::seen_rows(Site site, std::size_t layer) noexcept {
    return seen_rows_[static_cast<std::size_t>(site) * n_layer_ + layer];
}

// ---- decode ---------------------------------------------------------------------------------------------------------

void Hook::begin_decode() {
    require_idle("decode");
    steered_rows_.assign(steered_rows_.size(), 0);
    seen_rows_.assign(seen_rows_.size(), 0);
    error_[0] = '\0';
    decoding_.store(true);
}

void Hook::abandon_decode() noexcept {
    decoding_.store(false);
}

void Hook::end_decode(int64_t tokens_decoded) {
    decoding_.store(false);
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
    if (!plan_ || tokens_decoded == 0) {
        return;
    }
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            if (!steers(site, layer)) {
                continue;
            }
            // After the last block's attention llama.cpp keeps only the rows whose logits were asked for.
            const bool last = site != Site::attention && layer + 1 == n_layer_;
            const int64_t rows = steered_rows(site, layer);
            if (rows < (last ? 1 : tokens_decoded)) {
                throw std::runtime_error("steering reached " + std::to_string(rows) + " of " +
                                         std::to_string(tokens_decoded) + " tokens at " + place(site, layer));
            }
        }
    }
}

bool Hook::wants(Tensor * node) {
    if (probing_) {
        sites_->record(node);
        return false;
    }
    const bool residual = (plan_ && plan_->uses(Site::residual)) || capture_;
    const bool product = (plan_ && (plan_->uses(Site::attention) || plan_->uses(Site::mlp))) || capture_;
    if (!residual && !product) {
        return false;
    }
    int32_t layer = residual ? sites_->residual_layer(node) : -1;
    if (layer >= 0) {
        const auto at = static_cast<std::size_t>(layer);
        if (resident_ && steers(Site::residual, at)) {
            // The graph adds the direction by itself; only see that it does.
            if (node->op == abi().op_add && node->src[1] == sites_->resident(at)) {
                steered_rows(Site::residual, at) += abi().ggml_nrows(node);
            }
            return captures(Site::residual, at);
        }
        return steers(Site::residual, at) || captures(Site::residual, at);
    }
    const SiteMap::Place place = product ? sites_->product_place(node) : SiteMap::Place{};
    const auto at = static_cast<std::size_t>(place.layer);
    return place.layer >= 0 && (steers(place.site, at) || captures(place.site, at));
}

bool Hook::visit(const Tensor * node) {
    SiteMap::Place found{Site::residual, sites_->residual_layer(node)};
    if (found.layer < 0) {
        found = sites_->product_place(node);
    }
    if (found.layer >= 0 && abi().ggml_nrows(node) > 0) {
        treat(node, found.site, static_cast<std::size_t>(found.layer));
    }
    return plan_ || !capture_ || found.layer < 0 ||
           !capture_->ends_at(found.site, static_cast<std::size_t>(found.layer));
}

void Hook::treat(const Tensor * node, Site site, std::size_t layer) {
    const int64_t rows = abi().ggml_nrows(node);
    const RowAccess access(node);
    void * buffer = node->buffer != nullptr || node->view_src == nullptr ? node->buffer : node->view_src->buffer;
    if (buffer == nullptr || !abi().ggml_backend_buffer_is_host(buffer)) {
        return fail(place(site, layer) + " moved to memory that is not on the host");
    }
    if (!access.known()) {
        return fail(place(site, layer) + " has type " + abi().ggml_type_name(node->type) +
                    "; f32, f16 or bf16 expected");
    }
    if (static_cast<std::size_t>(node->ne[0]) != n_embd_ || node->nb[0] != access.element_size()) {
        return fail(place(site, layer) + " is not a contiguous row of " + std::to_string(n_embd_) + " values");
    }
    const bool steer_here = !(resident_ && site == Site::residual) && steers(site, layer);
    const float * direction = steer_here ? plan_->direction(site, layer) : nullptr;
    const bool capture_here = captures(site, layer);
    int64_t token = seen_rows(site, layer);
    auto * data = static_cast<char *>(node->data);
    for (int64_t i3 = 0; i3 < node->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < node->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < node->ne[1]; ++i1, ++token) {
                char * row = data + static_cast<std::size_t>(i1) * node->nb[1] +
                             static_cast<std::size_t>(i2) * node->nb[2] + static_cast<std::size_t>(i3) * node->nb[3];
                float * values = access.load(row, row_.data(), n_embd_);
                if (direction != nullptr) {
                    add(values, direction, n_embd_);
                    access.store(row, values, n_embd_);
                }
                if (capture_here) {  // after steering: what the next block reads
                    capture_->put(site, layer, token, values);
                }
            }
        }
    }
    seen_rows(site, layer) = token;
    if (direction != nullptr) {
        steered_rows(site, layer) += rows;
    }
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
                require_site(site, layer, true);
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
    decoding_.store(false);
    plan_.reset();
    if (sites_) {
        sites_->forget_resident();
    }
}

}  // namespace pysteer
