#include "row_tables.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pysteer {
namespace {

constexpr int64_t first_rows = 8;

// Sets the shape of the ids, which have room for more.
void shape(Tensor * ids, int64_t n_tokens, int64_t streams) noexcept {
    const auto row = static_cast<std::size_t>(n_tokens) * sizeof(int32_t);
    ids->ne[0] = n_tokens;
    ids->ne[1] = streams;
    ids->nb[1] = row;
    ids->nb[2] = ids->nb[3] = row * static_cast<std::size_t>(streams);
}

}  // namespace

void RowTables::resize(std::size_t n_layer, std::size_t n_embd) {
    release();
    n_embd_ = n_embd;
    layers_.resize(n_layer);
}

void RowTables::release() noexcept {
    for (Layer & layer : layers_) {
        release(layer);
    }
    layers_.clear();
    vectors_.clear();
    current_ = nullptr;
}

void RowTables::release(Layer & layer) noexcept {
    if (layer.buffer != nullptr) {
        abi().ggml_backend_buffer_free(layer.buffer);
    }
    if (layer.context != nullptr) {
        abi().ggml_free(layer.context);
    }
    layer = Layer{};
}

void RowTables::restore(Tensor * node) noexcept {
    if (node->op != abi().op_add_id) {
        return;
    }
    const auto found = vectors_.find(node);
    if (found != vectors_.end()) {
        node->op = abi().op_add;
        node->src[1] = found->second;
        node->src[2] = nullptr;
    }
}

bool RowTables::begin(Tensor * node, std::size_t layer) {
    const Abi & api = abi();
    const auto f32 = static_cast<int32_t>(FloatType::f32);
    const Tensor * input = node->src[0];
    if (!api.adds_by_id() || node->type != f32 || input->type != f32 || input->nb[0] != sizeof(float) ||
        node->ne[3] != 1) {
        return false;
    }
    current_ = &layers_[layer];
    current_layer_ = layer;
    ++node_;
    void * type = api.ggml_backend_buffer_get_type(buffer_of(node->src[1]));
    const int64_t n_ids = api.ggml_nrows(node);
    if (current_->type != type) {  // the first node, or a graph that computes the layer on another device
        release(*current_);
        current_->type = type;
        allocate(*current_, first_rows, n_ids);
    } else if (n_ids > current_->room) {
        reallocate(*current_, current_->table->ne[1], n_ids);
    }
    if (!current_->supported) {
        current_->supported = supports(node, *current_);
    }
    return *current_->supported;
}

void RowTables::allocate(Layer & layer, int64_t n_rows, int64_t n_ids) {
    const Abi & api = abi();
    layer.context = api.ggml_init({api.ggml_tensor_overhead() * 2, nullptr, /*no_alloc=*/true});
    if (layer.context != nullptr) {
        layer.table = api.ggml_new_tensor_2d(layer.context, static_cast<int32_t>(FloatType::f32),
                                             static_cast<int64_t>(n_embd_), n_rows);
        layer.ids = api.ggml_new_tensor_2d(layer.context, api.type_i32, n_ids, 1);
        layer.buffer = api.ggml_backend_alloc_ctx_tensors_from_buft(layer.context, layer.type);
    }
    if (layer.buffer == nullptr) {
        const std::string device = api.ggml_backend_buft_name(layer.type);
        release(layer);
        throw std::runtime_error("no memory on " + device + " for " + std::to_string(n_rows) + " directions of layer " +
                                 std::to_string(current_layer_) + "; offload fewer layers, or shorten the context");
    }
    layer.entries.resize(static_cast<std::size_t>(n_rows));
    layer.room = n_ids;
    layer.uploaded.clear();
    const std::vector<float> zeros(n_embd_);
    api.ggml_backend_tensor_set(layer.table, zeros.data(), 0, n_embd_ * sizeof(float));
}

// Keeps the sums.
void RowTables::reallocate(Layer & layer, int64_t n_rows, int64_t n_ids) {
    const Abi & api = abi();
    const auto kept = static_cast<std::size_t>(layer.table->ne[1]) * n_embd_;
    std::vector<float> sums(kept);
    api.ggml_backend_tensor_get(layer.table, sums.data(), 0, kept * sizeof(float));
    Layer next;
    next.type = layer.type;
    next.entries = layer.entries;
    next.supported = layer.supported;
    allocate(next, n_rows, n_ids);
    api.ggml_backend_tensor_set(next.table, sums.data(), 0, kept * sizeof(float));
    std::swap(layer, next);
    release(next);
}

bool RowTables::supports(const Tensor * node, const Layer & layer) const {
    const Abi & api = abi();
    void * device = api.ggml_backend_buft_get_device(layer.type);
    if (device == nullptr) {
        return api.ggml_backend_buffer_is_host(layer.buffer);
    }
    Tensor changed = *node;
    changed.op = api.op_add_id;
    changed.src[1] = layer.table;
    changed.src[2] = layer.ids;
    return api.ggml_backend_dev_supports_op(device, &changed);
}

std::optional<int32_t> RowTables::find(uint64_t plan, const float * factors, std::size_t n_factors) noexcept {
    for (std::size_t row = 1; row < current_->entries.size(); ++row) {
        Entry & entry = current_->entries[row];
        if (entry.plan == plan && entry.factors.size() == n_factors &&
            std::equal(entry.factors.begin(), entry.factors.end(), factors)) {
            entry.used = node_;
            return static_cast<int32_t>(row);
        }
    }
    return std::nullopt;
}

std::optional<int32_t> RowTables::add(uint64_t plan, const float * factors, std::size_t n_factors, const float * sum) {
    const auto first = current_->entries.begin() + 1;
    auto oldest = std::min_element(first, current_->entries.end(),
                                   [](const Entry & a, const Entry & b) { return a.used < b.used; });
    if (oldest->used == node_) {
        const int64_t n_rows = current_->table->ne[1];
        if (n_rows == most_rows) {
            return std::nullopt;
        }
        reallocate(*current_, std::min(2 * n_rows, most_rows), current_->room);
        oldest = current_->entries.begin() + static_cast<std::ptrdiff_t>(n_rows);
    }
    const auto row = static_cast<std::size_t>(oldest - current_->entries.begin());
    const std::size_t size = n_embd_ * sizeof(float);
    abi().ggml_backend_tensor_set(current_->table, sum, row * size, size);
    oldest->plan = plan;
    oldest->factors.assign(factors, factors + n_factors);
    oldest->used = node_;
    return static_cast<int32_t>(row);
}

void RowTables::change(Tensor * node, const std::vector<int32_t> & ids, int64_t streams) {
    const auto count = static_cast<int64_t>(ids.size());
    shape(current_->ids, count / streams, streams);
    if (current_->uploaded != ids) {
        abi().ggml_backend_tensor_set(current_->ids, ids.data(), 0, ids.size() * sizeof(int32_t));
        current_->uploaded = ids;
    }
    vectors_[node] = node->src[1];
    node->op = abi().op_add_id;
    node->src[1] = current_->table;
    node->src[2] = current_->ids;
}

}  // namespace pysteer
