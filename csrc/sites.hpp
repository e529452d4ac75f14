// Where a model's graph computes the sites, learned from the graph of one probe decode and recognised again in later
// ones.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "llama_abi.hpp"
#include "site.hpp"

namespace pysteer {

// One (site, layer) as the probe found it.
struct FoundSite {
    Site site;
    int32_t layer;
    std::string node;     // the node's name in the probe graph
    std::string backend;  // the buffer that holds it
    bool on_host;
    int64_t rows;
};

// The residual is where llama.cpp itself adds its control vector: during the probe, every control-vector tensor holds
// its own layer index, so the ADD that reads it proves which node is which layer's output. Layer 0 has no control
// vector; its output is the node with the same name and the suffix -0. The sites attention and mlp are the result of
// the matrix product with blk.N.attn_output.weight or blk.N.ffn_down.weight, with its scale, LoRA and bias if the graph
// has them.
class SiteMap {
  public:
    SiteMap(std::size_t n_layer, std::size_t n_embd) : n_layer_(n_layer), n_embd_(n_embd) {}

    // Probe: called for every node before it is computed, then once at the end.
    void record(Tensor * node);
    void learn();

    const std::vector<FoundSite> & found() const noexcept { return found_; }
    const FoundSite * find(Site site, std::size_t layer) const noexcept;
    // The control-vector tensor of a layer, or null. Owned by the llama_context.
    Tensor * resident(std::size_t layer) const noexcept {
        return layer < resident_.size() ? resident_[layer] : nullptr;
    }
    void forget_resident() noexcept { resident_.clear(); }

    // The layer whose site this node is, or -1. Cheap: called for every node of every graph.
    int32_t residual_layer(const Tensor * node) const noexcept;
    // A site that is known by the weight it is computed with; layer -1 is none.
    struct Place {
        Site site = Site::attention;
        int32_t layer = -1;
    };
    Place product_place(const Tensor * node) const noexcept;

  private:
    struct Node {
        Tensor * tensor;
        std::string name;
        int32_t op;
        int64_t width;
        int64_t rows;
        std::string backend;
        bool on_host;
        const Tensor * first_source;
        int32_t vector_layer;  // the layer whose control vector this node adds, or -1
        Tensor * vector;       // that control vector
        Place product;         // the site whose product with a weight this is
        bool continues_product;
    };

    void learn_residual();
    void learn_products();
    void add_found(Site site, int32_t layer, const Node & node);

    std::size_t n_layer_;
    std::size_t n_embd_;
    std::vector<Node> nodes_;
    std::vector<FoundSite> found_;
    std::vector<Tensor *> resident_;
    std::string residual_base_;  // "l_out" where the node is called l_out-N
    // Per site and layer: how many scale/LoRA/bias nodes follow the product; -1: no such site.
    std::array<std::vector<int32_t>, n_sites> depth_;
    int32_t deepest_ = -1;
};

}  // namespace pysteer
