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

struct WeightName {
    Site site;
    const char * middle;
};
constexpr std::array<WeightName, 2> weight_names = {{{Site::attention, ".attn_output."}, {Site::mlp, ".ffn_down."}}};

// Whose weight it is, by the name blk.N.attn_output.<rest> and the like; an empty `rest` accepts any (weight, bias,
// scale, LoRA).
SiteMap::Place weight_place(const Tensor * weight, const char * rest) noexcept {
    if (weight == nullptr || std::strncmp(weight->name, "blk.", 4) != 0) {
        return {};
    }
    int32_t layer = -1;
    const char * after = read_index(weight->name + 4, layer);
    if (after == nullptr) {
        return {};
    }
    for (const WeightName & name : weight_names) {
        const std::size_t length = std::strlen(name.middle);
        if (std::strncmp(after, name.middle, length) == 0 &&
            (*rest == '\0' || std::strcmp(after + length, rest) == 0)) {
            return {name.site, layer};
        }
    }
    return {};
}

// Whose matrix product with the weight the node is.
SiteMap::Place multiplied(const Tensor * node) noexcept {
    return node->op == abi().op_mul_mat ? weight_place(node->src[0], "weight") : SiteMap::Place{};
}

// Whether the node still computes the product's result from its first source: a scale, a LoRA term or a bias.
bool continues(const Tensor * node) noexcept {
    const Abi & api = abi();
    if ((node->op != api.op_add && node->op != api.op_mul) || node->src[1] == nullptr) {
        return false;
    }
    const Tensor * term = node->src[1];
    if (weight_place(term, "").layer >= 0) {
        return true;
    }
    if (term->op == api.op_scale && term->src[0] != nullptr) {  // LoRA: scale(B (A x)), B named after the weight
        term = term->src[0];
    }
    return term->op == api.op_mul_mat && weight_place(term->src[0], "").layer >= 0 && multiplied(term).layer < 0;
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
    node.product = multiplied(tensor);
    node.continues_product = continues(tensor);
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
    learn_products();
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

void SiteMap::learn_products() {
    for (auto & depths : depth_) {
        depths.assign(n_layer_, -1);
    }
    for (const Node & product : nodes_) {
        const int32_t layer = product.product.layer;
        if (layer < 0 || static_cast<std::size_t>(layer) >= n_layer_ ||
            static_cast<std::size_t>(product.width) != n_embd_) {
            continue;
        }
        const Node * last = &product;
        int32_t depth = 0;
        for (const Node & node : nodes_) {  // in graph order, so one pass follows the whole chain
            if (node.continues_product && node.first_source == last->tensor) {
                last = &node;
                ++depth;
            }
        }
        const Site site = product.product.site;
        depth_[static_cast<std::size_t>(site)][static_cast<std::size_t>(layer)] = depth;
        deepest_ = depth > deepest_ ? depth : deepest_;
        add_found(site, layer, *last);
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

SiteMap::Place SiteMap::product_place(const Tensor * node) const noexcept {
    for (int32_t depth = 0; depth <= deepest_ && node != nullptr; ++depth, node = node->src[0]) {
        const Place place = multiplied(node);
        if (place.layer >= 0) {
            const auto & depths = depth_[static_cast<std::size_t>(place.site)];
            const bool known = static_cast<std::size_t>(place.layer) < n_layer_;
            return known && depths[static_cast<std::size_t>(place.layer)] == depth ? place : Place{};
        }
        if (!continues(node)) {
            return {};
        }
    }
    return {};
}

}  // namespace pysteer
