// Where a model's graph computes the sites, learned from the graph of one probe decode and recognised again in later
// ones.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llama_abi.hpp"
#include "site.hpp"

namespace pysteer {

// The node of the probe graph that computes a place.
struct SiteNode {
    Site site;
    std::size_t layer;
    std::string node;     // its name
    std::string backend;  // the buffer that holds its values
    bool on_host;
};

// The residual is where llama.cpp itself adds its control vector: during the probe every control-vector tensor holds
// its own layer index, so the ADD that reads the tensor proves which node is which layer's output. Layer 0 has no
// control vector; its output is the node with the same name and the suffix -0. The sites attention and mlp are the
// result of the matrix product with blk.N.attn_output.weight or blk.N.ffn_down.weight, with the scale, LoRA and bias
// that the graph has for it.
class SiteMap {
  public:
    // The probe decodes n_tokens tokens.
    SiteMap(std::size_t n_layer, std::size_t n_embd, int64_t n_tokens)
        : n_layer_(n_layer), n_embd_(n_embd), n_tokens_(n_tokens) {}

    // Probe: called for every node before it is computed, then once at the end.
    void record(Tensor * node);
    void learn();

    const std::vector<SiteNode> & found() const noexcept { return found_; }
    // Null if the graph does not have the place.
    const SiteNode * find(Place place) const noexcept;
    // The control-vector tensor of a layer, or null. Owned by the llama_context. Null also where the graph adds only a
    // copy of it: at a border between devices, the ADD may be on another device than the layer's control vector.
    Tensor * resident(std::size_t layer) const noexcept {
        return layer < resident_.size() ? resident_[layer] : nullptr;
    }
    // True if a node of a layer adds the values of resident(layer).
    bool adds_resident(const Tensor * node, std::size_t layer) const noexcept;
    // True if a node of a layer adds the layer's control vector, or a copy of it.
    bool adds_vector(const Tensor * node, std::size_t layer) const noexcept;
    // Rows of a place for one token. The residual of Gemma 3n is n_embd x tokens x 4 streams, and llama.cpp adds its
    // control vector to every stream. A place with rows in another layout is not found.
    int64_t streams(Place place) const noexcept { return place.site == Site::residual ? residual_streams_ : 1; }
    void forget_resident() noexcept { resident_.clear(); }

    // The place that a node computes; `products`: look for the sites attention and mlp, too. Cheap: called for every
    // node of every graph.
    std::optional<Place> recognise(const Tensor * node, bool products) const noexcept {
        // Most names differ from the residual's in their first character.
        return products || node->name[0] == residual_base_[0] ? place_of(node, products) : std::nullopt;
    }

  private:
    // A node of the probe graph.
    struct Node {
        Tensor * tensor;
        std::string name;
        int64_t width;
        int64_t streams;  // rows for one token; 0: in an unknown layout
        std::string backend;
        bool on_host;
        const Tensor * first_source;
        std::optional<std::size_t> vector_layer;  // the layer whose control vector the node adds
        Tensor * vector;                          // that control vector; null: a copy on another device
        std::optional<Place> product;             // the place whose product with a weight the node is
        bool continues_product;
    };

    std::optional<std::size_t> marked_layer(const Tensor * vector) const;
    void learn_residual_name();
    void learn_residual();
    void learn_products();
    void add_found(Place place, const Node & node);
    std::optional<Place> place_of(const Tensor * node, bool products) const noexcept;
    std::optional<Place> residual_place(const Tensor * node) const noexcept;
    std::optional<Place> product_place(const Tensor * node) const noexcept;

    std::size_t n_layer_;
    std::size_t n_embd_;
    int64_t n_tokens_;
    std::vector<Node> nodes_;
    std::vector<SiteNode> found_;
    std::vector<Tensor *> resident_;  // by layer
    std::vector<bool> marked_;        // by layer: the graph adds the control vector, or a copy
    std::string residual_base_;       // "l_out" where the node is called l_out-N
    int64_t residual_streams_ = 1;
    // By place: how many scale, LoRA and bias nodes follow the product; -1: no product.
    std::vector<int32_t> depths_;
    int32_t deepest_ = -1;
};

}  // namespace pysteer
