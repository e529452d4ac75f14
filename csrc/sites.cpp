#include "sites.hpp"

#include <algorithm>
#include <cstring>

namespace pysteer {
namespace {

// Reads decimal digits at `text`; returns the position after them, or null if there are none.
const char * read_index(const char * text, int32_t & value) noexcept {
    const char * at = text;
    int32_t parsed = 0;
    while (*at >= '0' && *at <= '9' && parsed < 1'000'000) {
        parsed = parsed * 10 + (*at - '0');
        ++at;
    }
    value = parsed;
    return at == text ? nullptr : at;
}

// N if the name is blk.N.attn_output.<rest>, else -1; an empty `rest` accepts any (weight, bias, scale, LoRA).
int32_t attention_output_layer(const Tensor * weight, const char * rest) noexcept {
    constexpr const char * middle = ".attn_output.";
    if (weight == nullptr || std::strncmp(weight->name, "blk.", 4) != 0) {
        return -1;
    }
    int32_t layer = -1;
    const char * after = read_index(weight->name + 4, layer);
    if (after == nullptr || std::strncmp(after, middle, std::strlen(middle)) != 0) {
        return -1;
    }
    after += std::strlen(middle);
    return *rest == '\0' || std::strcmp(after, rest) == 0 ? layer : -1;
}

// N if the node is the matrix product with blk.N.attn_output.weight, else -1.
int32_t projection_layer(const Tensor * node) noexcept {
    return node->op == abi().op_mul_mat ? attention_output_layer(node->src[0], "weight") : -1;
}

// Whether the node still computes the projection's output from its first source: a scale, a LoRA term or a bias.
bool continues_projection(const Tensor * node) noexcept {
    const Abi & api = abi();
    if ((node->op != api.op_add && node->op != api.op_mul) || node->src[1] == nullptr) {
        return false;
    }
    const Tensor * term = node->src[1];
    if (attention_output_layer(term, "") >= 0) {
        return true;
    }
    if (term->op == api.op_scale && term->src[0] != nullptr) {  // LoRA: scale(B (A x)), B named after the weight
        term = term->src[0];
    }
    return term->op == api.op_mul_mat && attention_output_layer(term->src[0], "") >= 0 && projection_layer(term) < 0;
}

}  // namespace

void SiteMap::record(Tensor * tensor) {
    const Abi & api = abi();
    Node node{};
    node.tensor = tensor;
    node.name = tensor->name;
    node.op = tensor->op;
    node.width = tensor->ne[0];
    node.rows = api.ggml_nrows(tensor);
    void * buffer = tensor->buffer;
    if (buffer == nullptr && tensor->view_src != nullptr) {
        buffer = tensor->view_src->buffer;
    }
    node.on_host = buffer != nullptr && api.ggml_backend_buffer_is_host(buffer);
    node.backend = buffer != nullptr ? api.ggml_backend_buffer_name(buffer) : "no";
    node.first_source = tensor->src[0];
    node.projection_layer = projection_layer(tensor);
    node.continues_projection = continues_projection(tensor);
    node.vector_layer = -1;
    // A control-vector tensor is a leaf of the model's width; its content says whose it is.
    Tensor * vector = tensor->src[1];
    if (tensor->op == api.op_add && vector != nullptr && vector->op == api.op_none && vector->buffer != nullptr &&
        vector->type == static_cast<int32_t>(FloatType::f32) && std::strncmp(vector->name, "blk.", 4) != 0 &&
        static_cast<std::size_t>(api.ggml_nelements(vector)) == n_embd_) {
        std::vector<float> values(n_embd_);
        api.ggml_backend_tensor_get(vector, values.data(), 0, n_embd_ * sizeof(float));
        for (std::size_t layer = 1; layer < n_layer_; ++layer) {
            const auto marker = static_cast<float>(layer);
            if (std::all_of(values.begin(), values.end(), [marker](float value) { return value == marker; })) {
                node.vector_layer = static_cast<int32_t>(layer);
                node.vector = vector;
            }
        }
    }
    nodes_.push_back(std::move(node));
}

void SiteMap::learn() {
    learn_residual();
    learn_attention();
    nodes_.clear();
    nodes_.shrink_to_fit();
}

void SiteMap::add_found(Site site, int32_t layer, const Node & node) {
    found_.push_back({site, layer, node.name, node.backend, node.on_host, node.rows});
}

void SiteMap::learn_residual() {
    resident_.assign(n_layer_, nullptr);
    for (const Node & node : nodes_) {
        if (node.vector_layer < 0) {
            continue;
        }
        const std::string suffix = "-" + std::to_string(node.vector_layer);
        if (node.name.size() <= suffix.size() ||
            node.name.compare(node.name.size() - suffix.size(), suffix.size(), suffix) != 0) {
            continue;  // not named after its layer: could not be recognised in a later graph
        }
        const std::string base = node.name.substr(0, node.name.size() - suffix.size());
        if (residual_base_.empty()) {
            residual_base_ = base;
        }
        if (base == residual_base_) {
            resident_[static_cast<std::size_t>(node.vector_layer)] = node.vector;
        }
    }
    if (residual_base_.empty()) {
        // A model of one layer has no control vector to show the way; llama.cpp's usual name is then the only evidence.
        if (n_layer_ != 1) {
            return;
        }
        residual_base_ = "l_out";
    }
    for (std::size_t layer = 0; layer < n_layer_; ++layer) {
        const std::string name = residual_base_ + "-" + std::to_string(layer);
        const Node * match = nullptr;
        int matches = 0;
        for (const Node & node : nodes_) {
            if (node.name == name) {
                match = &node;
                ++matches;
            }
        }
        const bool expected = layer == 0 || resident_[layer] != nullptr;
        if (matches == 1 && expected && static_cast<std::size_t>(match->width) == n_embd_) {
            add_found(Site::residual, static_cast<int32_t>(layer), *match);
        }
    }
}

void SiteMap::learn_attention() {
    attention_depth_.assign(n_layer_, -1);
    for (const Node & product : nodes_) {
        const int32_t layer = product.projection_layer;
        if (layer < 0 || static_cast<std::size_t>(layer) >= n_layer_ ||
            static_cast<std::size_t>(product.width) != n_embd_) {
            continue;
        }
        const Node * last = &product;
        int32_t depth = 0;
        for (const Node & node : nodes_) {  // in graph order, so one pass follows the whole chain
            if (node.continues_projection && node.first_source == last->tensor) {
                last = &node;
                ++depth;
            }
        }
        attention_depth_[static_cast<std::size_t>(layer)] = depth;
        deepest_attention_ = depth > deepest_attention_ ? depth : deepest_attention_;
        add_found(Site::attention, layer, *last);
    }
}

const FoundSite * SiteMap::find(Site site, std::size_t layer) const noexcept {
    for (const FoundSite & candidate : found_) {
        if (candidate.site == site && static_cast<std::size_t>(candidate.layer) == layer) {
            return &candidate;
        }
    }
    return nullptr;
}

int32_t SiteMap::residual_layer(const Tensor * node) const noexcept {
    const std::size_t length = residual_base_.size();
    if (length == 0 || std::strncmp(node->name, residual_base_.c_str(), length) != 0 || node->name[length] != '-') {
        return -1;
    }
    int32_t layer = -1;
    const char * rest = read_index(node->name + length + 1, layer);
    return rest != nullptr && *rest == '\0' && static_cast<std::size_t>(layer) < n_layer_ ? layer : -1;
}

int32_t SiteMap::attention_layer(const Tensor * node) const noexcept {
    for (int32_t depth = 0; depth <= deepest_attention_ && node != nullptr; ++depth, node = node->src[0]) {
        const int32_t layer = projection_layer(node);
        if (layer >= 0) {
            const bool known = static_cast<std::size_t>(layer) < n_layer_;
            return known && attention_depth_[static_cast<std::size_t>(layer)] == depth ? layer : -1;
        }
        if (!continues_projection(node)) {
            return -1;
        }
    }
    return -1;
}

}  // namespace pysteer
