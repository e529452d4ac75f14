#include "batch.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pysteer {
namespace {

Sequence * sequence_of(const RowRun & run, const std::vector<std::shared_ptr<Sequence>> & slots) noexcept {
    const bool known = run.slot >= 0 && static_cast<std::size_t>(run.slot) < slots.size();
    return known ? slots[static_cast<std::size_t>(run.slot)].get() : nullptr;
}

}  // namespace

void Batch::resize(std::size_t n_layer) {
    n_layer_ = n_layer;
    clear();
    active_.assign(n_sites * n_layer, 0);
}

void Batch::assign(const RowRun * runs, std::size_t n_runs, const std::vector<std::shared_ptr<Sequence>> & slots) {
    clear();
    runs_.assign(runs, runs + n_runs);
    for (const RowRun & run : runs_) {
        add_run(run, sequence_of(run, slots));
    }
    find_active();
}

void Batch::assign_foreign(const RowRun & run, int64_t n_positions,
                           const std::vector<std::shared_ptr<Sequence>> & slots) {
    clear();
    runs_.assign(1, run);
    runs_.front().count = std::min(run.count, n_positions);  // beyond its positions, no term acts
    Sequence * sequence = sequence_of(run, slots);
    uses_products_ = sequence != nullptr && sequence->plan().uses_products();
    for (int64_t k = 0; k < run.count; ++k) {
        rows_.push_back({sequence, run.position + std::min(k, n_positions - 1)});
    }
    find_active();
}

void Batch::clear() noexcept {
    runs_.clear();
    rows_.clear();
    output_rows_.clear();
    gates_.clear();
    decisions_due_ = 0;
    uses_products_ = false;
}

void Batch::add_run(const RowRun & run, Sequence * sequence) {
    const int64_t decision = sequence != nullptr ? sequence->next_decision() : -1;
    if (decision >= 0 && run.count > 0 && run.position + run.count - 1 > decision) {
        throw std::invalid_argument("the router decides at token " + std::to_string(decision) +
                                    ", which must be the last of its decode; found tokens up to " +
                                    std::to_string(run.position + run.count - 1));
    }
    uses_products_ = uses_products_ || (sequence != nullptr && sequence->plan().uses_products());
    const bool gated = sequence != nullptr && sequence->plan().gate() != nullptr;
    bool reads = false;
    for (int64_t k = 0; k < run.count; ++k) {
        if (run.outputs == RowRun::every || (run.outputs == RowRun::last && k + 1 == run.count)) {
            output_rows_.push_back(static_cast<int32_t>(rows_.size()));
        }
        rows_.push_back({sequence, run.position + k});
        if (gated) {
            reads = reads || sequence->reads(run.position + k);
            decisions_due_ += sequence->decides(run.position + k) ? 1 : 0;
        }
    }
    if (reads) {
        gates_.push_back(sequence->plan().gate());
    }
}

template <typename Visit>
void Batch::for_each_steered(Visit && visit) const {
    std::size_t row = 0;
    for (const RowRun & run : runs_) {
        Sequence * sequence = run.count > 0 ? rows_[row].sequence : nullptr;
        row += static_cast<std::size_t>(run.count);
        if (sequence != nullptr) {
            visit(*sequence, run);
        }
    }
}

void Batch::find_active() noexcept {
    std::fill(active_.begin(), active_.end(), static_cast<uint8_t>(0));
    for_each_steered([&](const Sequence & sequence, const RowRun & run) {
        const std::vector<Term> & terms = sequence.plan().terms();
        for (std::size_t t = 0; t < terms.size(); ++t) {
            bool acts = false;
            for (int64_t k = 0; k < run.count && !acts; ++k) {
                acts = sequence.acts(t, run.position + k);
            }
            if (!acts) {
                continue;
            }
            for (const std::size_t at : terms[t].places) {
                active_[at] = 1;
            }
        }
    });
}

bool Batch::reads_at(Place place) const noexcept {
    return std::any_of(gates_.begin(), gates_.end(), [&](const Gate * gate) { return gate->reads_at(place); });
}

bool Batch::any_active() const noexcept {
    return std::any_of(active_.begin(), active_.end(), [](uint8_t flag) { return flag != 0; });
}

void Batch::take_decision() noexcept {
    --decisions_due_;
    find_active();
}

}  // namespace pysteer
