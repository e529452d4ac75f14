#include "resident.hpp"

#include <algorithm>
#include <stdexcept>

#include "llama_abi.hpp"

namespace pysteer {
namespace {

// True if every row is steered like the first row.
bool all_alike(const std::vector<Row> & rows) noexcept {
    const Row & first = rows.front();
    const bool uniform = first.sequence->plan().uniform();
    const uint64_t key = uniform ? 0 : first.sequence->key(first.position);
    return std::all_of(rows.begin(), rows.end(), [&](const Row & row) {
        return row.sequence != nullptr && &row.sequence->plan() == &first.sequence->plan() &&
               (uniform || row.sequence->key(row.position) == key);
    });
}

// True if all terms on a row add to the residual of layers >= 1.
bool only_adds(const Row & row) noexcept {
    const std::vector<Term> & terms = row.sequence->plan().terms();
    for (std::size_t t = 0; t < terms.size(); ++t) {
        const float after = row.sequence->factor(t, row.position, false);
        const float before = row.sequence->factor(t, row.position, true);
        if (before != after || (after != 0.0f && !terms[t].only_control_vector)) {
            return false;
        }
    }
    return true;
}

}  // namespace

bool fits_control_vector(const Batch & batch) {
    const std::vector<Row> & rows = batch.rows();
    const Sequence * first = rows.front().sequence;
    // A gate reads rows before they are steered, and the tensors would steer them first. The hook does not check the
    // rows that the graph steers by itself, so the sum must be too small to overflow.
    const bool fits = first != nullptr && first->plan().injection() != Injection::hooked &&
                      first->plan().stays_finite() && batch.gates().empty() && all_alike(rows) &&
                      only_adds(rows.front());
    const bool insists = std::any_of(rows.begin(), rows.end(), [](const Row & row) {
        return row.sequence != nullptr && row.sequence->plan().injection() == Injection::resident;
    });
    if (insists && !fits) {
        throw std::invalid_argument(
            "injection 'resident' cannot express these rows: llama.cpp's control vector adds to the residual of layers "
            ">= 1, the same to every row, less than 1e38; use 'auto' or 'hooked'");
    }
    return fits;
}

void ResidentVectors::resize(std::size_t n_layer, std::size_t n_embd) {
    zeros_.assign(n_embd, 0.0f);
    nonzero_.assign(n_layer, true);
    plan_ = nullptr;
}

void ResidentVectors::write(const SiteMap & sites, const Batch & batch, Steerer & steerer) {
    const Row & row = batch.rows().front();
    const std::shared_ptr<const Plan> & plan = row.sequence->shared_plan();
    const uint64_t key = row.sequence->key(row.position);
    if (plan_ == plan && key_ == key) {
        return;
    }
    for (std::size_t layer = 1; layer < nonzero_.size(); ++layer) {
        const Place place{Site::residual, layer};
        set(sites, layer, batch.active_at(place) ? steerer.addition(*row.sequence, row.position, place) : nullptr);
    }
    plan_ = plan;
    key_ = key;
}

void ResidentVectors::write_zeros(const SiteMap & sites) {
    for (std::size_t layer = 1; layer < nonzero_.size(); ++layer) {
        set(sites, layer, nullptr);
    }
    plan_ = nullptr;
}

// Null: zeros.
void ResidentVectors::set(const SiteMap & sites, std::size_t layer, const float * values) {
    Tensor * tensor = sites.resident(layer);
    if (tensor == nullptr || (values == nullptr && !nonzero_[layer])) {
        return;
    }
    abi().ggml_backend_tensor_set(tensor, values != nullptr ? values : zeros_.data(), 0, zeros_.size() * sizeof(float));
    nonzero_[layer] = values != nullptr;
}

}  // namespace pysteer
