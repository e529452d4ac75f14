#include "hook.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <utility>

#include "operators.hpp"

namespace pysteer {
namespace {

std::string shape_text(std::size_t n_layer, std::size_t n_embd) {
    return std::to_string(n_layer) + " layers of width " + std::to_string(n_embd);
}

}  // namespace

// ---- probe ----------------------------------------------------------------------------------------------------------

void Hook::begin_probe(std::size_t n_layer, std::size_t n_embd, int64_t n_tokens) {
    require_idle("probe the model");
    n_layer_ = n_layer;
    n_embd_ = n_embd;
    sites_.emplace(n_layer, n_embd, n_tokens);
    batch_.resize(n_layer);
    row_map_.resize(n_layer);
    resident_.resize(n_layer, n_embd);
    tables_.resize(n_layer, n_embd);
    steerer_.resize(n_embd);
    row_.assign(n_embd, 0.0f);
    error_[0] = '\0';
    probing_ = true;
}

void Hook::end_probe() {
    probing_ = false;
    sites_->learn();
    resident_.write_zeros(*sites_);
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
}

const std::vector<SiteNode> & Hook::sites() const {
    if (!sites_) {
        throw std::runtime_error("the model has not been probed");
    }
    return sites_->found();
}

// ---- sequences ------------------------------------------------------------------------------------------------------

void Hook::require_idle(const char * action) const {
    if (detached_) {
        throw std::runtime_error(std::string("cannot ") + action + ": the model is closed");
    }
    if (decoding_.load()) {
        throw std::runtime_error(std::string("cannot ") + action + " while a decode is running");
    }
}

void Hook::require_place(Place place) const {
    if (!sites_ || sites_->find(place) == nullptr) {
        throw std::invalid_argument("this model's graph has no " + place_name(place));
    }
}

void Hook::require_fit(const Plan & plan) const {
    if (plan.n_layer() != n_layer_ || plan.n_embd() != n_embd_) {
        throw std::invalid_argument("the plan is for " + shape_text(plan.n_layer(), plan.n_embd()) +
                                    ", the model has " + shape_text(n_layer_, n_embd_));
    }
    for (const Term & term : plan.terms()) {
        for (const std::size_t at : term.places) {
            require_place(place_at(at, n_layer_));
        }
    }
    if (plan.gate() == nullptr) {
        return;
    }
    for (const Gate::Read & read : plan.gate()->reads()) {
        const Place place{plan.gate()->site(), read.layer};
        require_place(place);
        if (read.pools && !keeps_every_row(place, n_layer_)) {
            throw std::invalid_argument("the router averages over tokens at " + place_name(place) +
                                        ", where llama.cpp computes only the last token; read it at another layer");
        }
    }
}

void Hook::set_sequence(std::size_t slot, std::shared_ptr<Sequence> sequence) {
    require_idle("change the steering");
    if (sequence) {
        require_fit(sequence->plan());
        steerer_.reserve(sequence->plan());
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
    error_[0] = '\0';
    batch_.assign(runs, n_runs, slots_);
    begin();
}

void Hook::begin() {
    cuts_ = 0;
    row_map_.begin(batch_, batch_.active());
    const bool steers = batch_.any_active();
    is_resident_ = steers && fits_control_vector(batch_);
    if (is_resident_) {
        resident_.write(*sites_, batch_, steerer_);
    } else if (sites_) {
        resident_.write_zeros(*sites_);
    }
    busy_ = steers || !batch_.gates().empty() || capture_ != nullptr;
    decoding_.store(true);
}

void Hook::end_decode() {
    abandon_decode();
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
    row_map_.require_all_reached();
    if (batch_.decisions_due() > 0) {
        throw std::runtime_error("the router did not decide: the graph did not compute its last layer");
    }
}

void Hook::begin_foreign(std::size_t slot, int64_t position, int64_t n_rows, int64_t n_positions) {
    require_idle("decode");
    if (position < 0 || n_rows < 1 || n_positions < 1) {
        throw std::invalid_argument("expected rows at positions >= 0, found " + std::to_string(n_rows) + " rows at " +
                                    std::to_string(n_positions) + " positions from " + std::to_string(position));
    }
    error_[0] = '\0';
    batch_.assign_foreign({static_cast<int32_t>(slot), position, n_rows, RowRun::none}, n_positions, slots_);
    begin();
    busy_ = true;  // so that the rows are counted
}

int64_t Hook::end_foreign() {
    abandon_decode();
    if (error_[0] != '\0') {
        throw std::runtime_error(error_.data());
    }
    const int64_t n_rows = row_map_.tokens_passed();
    if (n_rows > static_cast<int64_t>(batch_.rows().size())) {
        throw std::runtime_error("expected at most " + std::to_string(batch_.rows().size()) + " rows, found " +
                                 std::to_string(n_rows));
    }
    batch_.truncate(static_cast<std::size_t>(n_rows));
    row_map_.require_all_reached();
    return n_rows;
}

void Hook::abandon_decode() noexcept {
    decoding_.store(false);
    busy_ = false;
}

// ---- callback -------------------------------------------------------------------------------------------------------

bool Hook::callback(Tensor * node, bool ask, void * self) noexcept {
    auto & hook = *static_cast<Hook *>(self);
    try {
        return ask ? hook.wants(node) : hook.visit(node);
    } catch (const std::exception & error) {
        hook.fail(error.what());
    } catch (...) {
        hook.fail("unknown exception in the eval callback");
    }
    return !ask;  // a computed node: go on even after an error, which end_decode() reports
}

void Hook::fail(const std::string & message) noexcept {
    if (error_[0] == '\0') {  // the first cause counts
        std::snprintf(error_.data(), error_.size(), "%s", message.c_str());
    }
}

bool Hook::wants(Tensor * node) {
    if (probing_) {
        sites_->record(node);
        return false;
    }
    if (!busy_ && !tables_.used()) {
        return false;
    }
    const std::optional<Place> place = sites_->recognise(node, batch_.uses_products() || capture_);
    if (!place) {
        return false;
    }
    tables_.restore(node);
    if (!busy_) {
        return false;
    }
    const int64_t n_rows = abi().ggml_nrows(node) / sites_->streams(*place);
    row_map_.pass(*place, n_rows);
    if (by_vector(*place) && sites_->adds_resident(node, place->layer)) {
        row_map_.reach(*place, n_rows);  // the graph adds the direction by itself
    }
    if (steers_by_table(node, *place)) {
        row_map_.reach(*place, n_rows);
        return false;
    }
    if (touches(node, *place)) {
        ++cuts_;
        return true;
    }
    if (!by_vector(*place)) {
        row_map_.reach(*place, n_rows);  // checked, and left alone
    }
    return false;
}

std::optional<RowIndices> Hook::rows_of(const Tensor * node, Place place) const noexcept {
    const int64_t streams = sites_->streams(place);
    const int64_t tokens = abi().ggml_nrows(node) / streams;
    if (streams > 1 && (node->ne[1] != tokens || node->ne[2] != streams)) {
        return std::nullopt;
    }
    return row_map_.rows_of(place, tokens);
}

bool Hook::steers_by_table(Tensor * node, Place place) {
    if (!batch_.active_at(place) || by_vector(place) || captures(place) || place.site != Site::residual ||
        !sites_->adds_vector(node, place.layer)) {
        return false;
    }
    const std::optional<RowIndices> indices = rows_of(node, place);
    if (!indices || !tables_.begin(node, place.layer)) {
        return false;
    }
    const int64_t streams = sites_->streams(place);
    const int64_t tokens = abi().ggml_nrows(node) / streams;
    ids_.clear();
    steerer_.begin_node();
    for (int64_t token = 0; token < tokens; ++token) {
        const std::optional<int32_t> id = table_row(batch_.rows()[static_cast<std::size_t>((*indices)[token])], place);
        if (!id) {
            return false;
        }
        ids_.push_back(*id);
    }
    if (std::all_of(ids_.begin(), ids_.end(), [](int32_t id) { return id == 0; })) {
        return false;
    }
    for (int64_t k = tokens; k < streams * tokens; ++k) {
        ids_.push_back(ids_[static_cast<std::size_t>(k - tokens)]);
    }
    tables_.change(node, ids_, streams);
    return true;
}

std::optional<int32_t> Hook::table_row(const Row & row, Place place) {
    if (row.sequence == nullptr) {
        return 0;
    }
    if (row.sequence->reads_at(place, row.position)) {
        return std::nullopt;  // a gate reads a row before the row is steered
    }
    const Plan & plan = row.sequence->plan();
    switch (steerer_.find_factors(*row.sequence, row.position, place)) {
        case Steerer::Way::none:
            return 0;
        case Steerer::Way::operators:
            return std::nullopt;
        case Steerer::Way::additions:
            break;
    }
    // The hook does not see the rows that the graph steers by itself: the sum must be too small to overflow.
    if (plan.injection() == Injection::hooked || !plan.stays_finite()) {
        return std::nullopt;
    }
    const float * factors = steerer_.factors();
    const std::size_t n_factors = plan.ops(place).size();
    const std::optional<int32_t> known = tables_.find(plan.id(), factors, n_factors);
    return known ? known : tables_.add(plan.id(), factors, n_factors, steerer_.sum(plan, place));
}

bool Hook::touches(const Tensor * node, Place place) const noexcept {
    if (captures(place) && only_captures() && capture_->ends_at(place)) {
        return true;  // to end the graph
    }
    if (!(batch_.active_at(place) && !by_vector(place)) && !captures(place) && !batch_.reads_at(place)) {
        return false;
    }
    const std::optional<RowIndices> indices = rows_of(node, place);
    if (!indices) {
        return true;  // for visit() to report
    }
    const int64_t tokens = abi().ggml_nrows(node) / sites_->streams(place);
    for (int64_t token = 0; token < tokens; ++token) {
        if (touches_row(place, static_cast<std::size_t>((*indices)[token]), true)) {
            return true;
        }
    }
    return false;
}

bool Hook::touches_row(Place place, std::size_t index, bool first_stream) const noexcept {
    const Row & row = batch_.rows()[index];
    if (row.sequence != nullptr) {
        if (!by_vector(place) && batch_.active_at(place) && Steerer::acts(*row.sequence, row.position, place)) {
            return true;
        }
        // A decision may steer the token's other streams, too.
        if (first_stream ? row.sequence->reads_at(place, row.position) : row.sequence->decides(row.position)) {
            return true;
        }
    }
    return first_stream && captures(place) && capture_->takes(index);
}

bool Hook::visit(Tensor * node) {
    const std::optional<Place> place = sites_->recognise(node, true);
    if (!place) {
        return true;
    }
    treat(node, *place);
    return !only_captures() || !capture_->ends_at(*place);
}

void Hook::treat(Tensor * node, Place place) {
    NodeRows rows(node, n_embd_, copies_);
    if (rows.count() == 0) {
        return;
    }
    if (const std::string problem = rows.problem(); !problem.empty()) {
        return fail(place_name(place) + " " + problem);
    }
    const int64_t streams = sites_->streams(place);
    const std::optional<RowIndices> indices = rows_of(node, place);
    if (!indices) {
        return fail("cannot tell which tokens the " + std::to_string(rows.count()) + " rows of " + place_name(place) +
                    " are");
    }
    const auto index_of = [&](int64_t token) { return static_cast<std::size_t>((*indices)[token]); };
    rows.fetch(streams,
               [&](int64_t token, int64_t stream) { return touches_row(place, index_of(token), stream == 0); });
    const bool reads = batch_.reads_at(place);
    steerer_.begin_node();
    rows.for_each(streams, [&](int64_t token, int64_t stream, int64_t number) {
        // A token is read, and captured, in its first stream, which attention and feed-forward work on.
        const Work work{place, reads && stream == 0, captures(place) && stream == 0, rows.limit()};
        float * values = rows.load(number, row_.data());
        if (treat_row(work, index_of(token), values)) {
            rows.store(number, values);
        }
    });
    rows.write_back();
    if (!by_vector(place)) {
        row_map_.reach(place, rows.count() / streams);
    }
}

bool Hook::treat_row(const Work & work, std::size_t index, float * values) {
    const Row & row = batch_.rows()[index];
    if (work.reads && row.sequence != nullptr && row.sequence->read(work.place, row.position, values)) {
        batch_.take_decision();
    }
    const bool steered = !by_vector(work.place) && row.sequence != nullptr && batch_.active_at(work.place) &&
                         steerer_.steer(*row.sequence, row.position, work.place, values);
    if (steered && !(largest(values, n_embd_) <= work.limit)) {
        fail("steering makes the hidden state not finite at " + place_name(work.place) + "; lower the strength");
        // In the KV cache such a row would reach every sequence: a weight of 0 times infinity is NaN.
        std::fill(values, values + n_embd_, 0.0f);
    }
    if (work.captures) {  // after steering: the input of the next block
        capture_->put(work.place, index, values);
    }
    return steered;
}

// ---- capture --------------------------------------------------------------------------------------------------------

void Hook::begin_capture(std::unique_ptr<Capture> capture) {
    require_idle("capture");
    if (capture->n_layer() != n_layer_ || capture->n_embd() != n_embd_) {
        throw std::invalid_argument("the capture is for " + shape_text(capture->n_layer(), capture->n_embd()) +
                                    ", the model has " + shape_text(n_layer_, n_embd_));
    }
    for (const Site site : all_sites) {
        for (std::size_t layer = 0; layer < n_layer_; ++layer) {
            if (capture->wants({site, layer})) {
                require_place({site, layer});
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
    tables_.release();
    if (sites_) {
        sites_->forget_resident();
    }
}

}  // namespace pysteer
