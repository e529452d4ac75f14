#include "sites.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace pysteer {
namespace {

// Reads decimal digits at `text` into `value`; returns the position after them, or null if there are none.
const char * read_index(const char * text, std::size_t & value) noexcept {
    const char * at = text;
    value = 0;
    while (*at >= '0' && *at <= '9' && value < 1'000'000) {
        value = value * 10 + static_cast<std::size_t>(*at - '0');
        ++at;
    }
    return at == text ? nullptr : at;
}

// ggml's scheduler calls the copy of a tensor on another device <device>#<name>#<number>. Returns <name>#<number>, or
// null for a tensor that is no copy.
const char * split_copy(const Tensor * tensor) noexcept {
    const char * mark = std::strchr(tensor->name, '#');
    return mark != nullptr && std::strchr(mark + 1, '#') != nullptr ? mark + 1 : nullptr;
}

struct WeightName {
    Site site;
    const char * middle;
};
constexpr std::array<WeightName, 2> weight_names = {{{Site::attention, ".attn_output."}, {Site::mlp, ".ffn_down."}}};

// The place that a weight called blk.N.attn_output.<rest> or blk.N.ffn_down.<rest> belongs to; an empty `rest` accepts
// any (weight, bias, scale, LoRA).
std::optional<Place> weight_place(const Tensor * weight, const char * rest) noexcept {
    if (weight == nullptr) {
        return std::nullopt;
    }
    const char * name = weight->name;
    if (const char * copied = split_copy(weight)) {
        name = copied;
    }
    if (std::strncmp(name, "blk.", 4) != 0) {
        return std::nullopt;
    }
    std::size_t layer = 0;
    const char * after = read_index(name + 4, layer);
    if (after == nullptr) {
        return std::nullopt;
    }
    for (const WeightName & known : weight_names) {
        if (std::strncmp(after, known.middle, std::strlen(known.middle)) != 0) {
            continue;
        }
        const char * found = after + std::strlen(known.middle);
        const std::size_t length = std::strlen(rest);
        if (length == 0 ||
            (std::strncmp(found, rest, length) == 0 && (found[length] == '\0' || found[length] == '#'))) {
            return Place{known.site, layer};
        }
    }
    return std::nullopt;
}

// The place whose product with its weight the node is.
std::optional<Place> multiplied(const Tensor * node) noexcept {
    return node->op == abi().op_mul_mat ? weight_place(node->src[0], "weight") : std::nullopt;
}

// True if the node still computes the product's result from its first source: a scale, a LoRA term or a bias.
bool continues(const Tensor * node) noexcept {
    const Abi & api = abi();
    if ((node->op != api.op_add && node->op != api.op_mul) || node->src[1] == nullptr) {
        return false;
    }
    const Tensor * term = node->src[1];
    if (weight_place(term, "")) {
        return true;
    }
    if (term->op == api.op_scale && term->src[0] != nullptr) {  // LoRA: scale(B (A x)), B named after the weight
        term = term->src[0];
    }
    return term->op == api.op_mul_mat && weight_place(term->src[0], "") && !multiplied(term);
}

bool ends_with(const std::string & text, const std::string & end) noexcept {
    return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

void SiteMap::record(Tensor * tensor) {
    const Abi & api = abi();
    void * buffer = buffer_of(tensor);
    Node node{};
    node.tensor = tensor;
    node.name = tensor->name;
    node.width = tensor->ne[0];
    node.streams = tensor->ne[1] == n_tokens_ && tensor->ne[3] == 1 ? tensor->ne[2] : 0;
    node.on_host = is_on_host(tensor);
    node.backend = buffer != nullptr ? api.ggml_backend_buffer_name(buffer) : "no";
    node.first_source = tensor->src[0];
    node.product = multiplied(tensor);
    node.continues_product = continues(tensor);
    Tensor * vector = tensor->src[1];
    if (tensor->op == api.op_add && vector != nullptr) {
        node.vector_layer = marked_layer(vector);
        node.vector = node.vector_layer && split_copy(vector) == nullptr ? vector : nullptr;
    }
    nodes_.push_back(std::move(node));
}

// The layer of a control-vector tensor: a leaf of the model's width whose elements all equal the layer's index.
std::optional<std::size_t> SiteMap::marked_layer(const Tensor * vector) const {
    const Abi & api = abi();
    if (vector->op != api.op_none || vector->buffer == nullptr ||
        vector->type != static_cast<int32_t>(FloatType::f32) || std::strncmp(vector->name, "blk.", 4) == 0 ||
        static_cast<std::size_t>(api.ggml_nelements(vector)) != n_embd_) {
        return std::nullopt;
    }
    std::vector<float> values(n_embd_);
    api.ggml_backend_tensor_get(vector, values.data(), 0, n_embd_ * sizeof(float));
    for (std::size_t layer = 1; layer < n_layer_; ++layer) {
        const auto marker = static_cast<float>(layer);
        if (std::all_of(values.begin(), values.end(), [marker](float value) { return value == marker; })) {
            return layer;
        }
    }
    return std::nullopt;
}

void SiteMap::learn() {
    learn_residual_name();
    learn_residual();
    learn_products();
    nodes_.clear();
    nodes_.shrink_to_fit();
}

void SiteMap::add_found(Place place, const Node & node) {
    found_.push_back({place.site, place.layer, node.name, node.backend, node.on_host});
}

// The name before -N of the nodes that add a control vector, and those vectors. A node that is not named after its
// layer could not be recognised in a later graph.
void SiteMap::learn_residual_name() {
    resident_.assign(n_layer_, nullptr);
    marked_.assign(n_layer_, false);
    for (const Node & node : nodes_) {
        const std::string suffix = node.vector_layer ? "-" + std::to_string(*node.vector_layer) : "";
        if (!node.vector_layer || !ends_with(node.name, suffix)) {
            continue;
        }
        const std::string base = node.name.substr(0, node.name.size() - suffix.size());
        if (residual_base_.empty()) {
            residual_base_ = base;
        }
        if (base == residual_base_) {
            resident_[*node.vector_layer] = node.vector;
            marked_[*node.vector_layer] = true;
        }
    }
    if (residual_base_.empty() && n_layer_ == 1) {
        residual_base_ = "l_out";  // no control vector shows the way: llama.cpp's usual name is the only evidence
    }
}

void SiteMap::learn_residual() {
    for (std::size_t layer = 0; layer < n_layer_ && !residual_base_.empty(); ++layer) {
        const std::string name = residual_base_ + "-" + std::to_string(layer);
        const auto named = [&](const Node & node) { return node.name == name; };
        const auto match = std::find_if(nodes_.begin(), nodes_.end(), named);
        const bool expected = layer == 0 || marked_[layer];
        if (expected && match != nodes_.end() && static_cast<std::size_t>(match->width) == n_embd_ &&
            match->streams > 0 && (found_.empty() || match->streams == residual_streams_) &&
            std::none_of(match + 1, nodes_.end(), named)) {
            residual_streams_ = match->streams;
            add_found({Site::residual, layer}, *match);
        }
    }
}

void SiteMap::learn_products() {
    depths_.assign(n_sites * n_layer_, -1);
    for (const Node & product : nodes_) {
        if (!product.product || product.product->layer >= n_layer_ || product.streams != 1 ||
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
        depths_[place_index(*product.product, n_layer_)] = depth;
        deepest_ = std::max(deepest_, depth);
        add_found(*product.product, *last);
    }
}

bool SiteMap::adds_resident(const Tensor * node, std::size_t layer) const noexcept {
    // The scheduler makes copies anew in each graph, of the values at that time.
    return resident(layer) != nullptr && adds_vector(node, layer);
}

bool SiteMap::adds_vector(const Tensor * node, std::size_t layer) const noexcept {
    return marked_[layer] && node->op == abi().op_add && node->src[1] != nullptr &&
           (node->src[1] == resident(layer) || split_copy(node->src[1]) != nullptr);
}

const SiteNode * SiteMap::find(Place place) const noexcept {
    for (const SiteNode & candidate : found_) {
        if (candidate.site == place.site && candidate.layer == place.layer) {
            return &candidate;
        }
    }
    return nullptr;
}

std::optional<Place> SiteMap::place_of(const Tensor * node, bool products) const noexcept {
    const std::optional<Place> residual = residual_place(node);
    return residual || !products ? residual : product_place(node);
}

std::optional<Place> SiteMap::residual_place(const Tensor * node) const noexcept {
    const std::size_t length = residual_base_.size();
    if (length == 0 || std::strncmp(node->name, residual_base_.c_str(), length) != 0 || node->name[length] != '-') {
        return std::nullopt;
    }
    std::size_t layer = 0;
    const char * rest = read_index(node->name + length + 1, layer);
    return rest != nullptr && *rest == '\0' && layer < n_layer_ ? std::optional(Place{Site::residual, layer})
                                                                : std::nullopt;
}

std::optional<Place> SiteMap::product_place(const Tensor * node) const noexcept {
    for (int32_t depth = 0; depth <= deepest_ && node != nullptr; ++depth, node = node->src[0]) {
        if (const std::optional<Place> place = multiplied(node)) {
            const bool known = place->layer < n_layer_ && depths_[place_index(*place, n_layer_)] == depth;
            return known ? place : std::nullopt;
        }
        if (!continues(node)) {
            return std::nullopt;
        }
    }
    return std::nullopt;
}

}  // namespace pysteer
