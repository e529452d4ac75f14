// The rows of one node as float32, from any type and layout.
//
// The hook reaches the values of a tensor through HostRows alone. For a tensor on a device, the same interface over a
// copy in host memory would do: fetched before the first load(), written back after the last store().
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "llama_abi.hpp"

namespace pysteer {

// The rows of a node in host memory, each n_embd values of f32, f16 or bf16.
class HostRows {
  public:
    HostRows(const Tensor * node, std::size_t n_embd) noexcept
        : node_(node), n_embd_(n_embd), type_(static_cast<FloatType>(node->type)) {}

    // The reason why the rows cannot be read ("has type i32; ..."), or "". With a reason, call neither load() nor
    // store().
    std::string problem() const;

    int64_t count() const noexcept { return node_->ne[1] * node_->ne[2] * node_->ne[3]; }
    // The largest absolute value that a row can hold.
    float limit() const noexcept;

    // Calls visit(number, row) for each row in turn; `row` is for load() and store().
    template <typename Visit>
    void for_each(Visit && visit) const {
        int64_t number = 0;
        for (int64_t i3 = 0; i3 < node_->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < node_->ne[2]; ++i2) {
                char * row = static_cast<char *>(node_->data) + static_cast<std::size_t>(i3) * node_->nb[3] +
                             static_cast<std::size_t>(i2) * node_->nb[2];
                for (int64_t i1 = 0; i1 < node_->ne[1]; ++i1, row += node_->nb[1]) {
                    visit(number++, row);
                }
            }
        }
    }

    // The row itself if it is f32, else a copy in `scratch`, which has room for n_embd values.
    float * load(char * row, float * scratch) const noexcept;
    // Writes back what load() returned.
    void store(char * row, const float * values) const noexcept;

  private:
    std::size_t element_size() const noexcept { return type_ == FloatType::f32 ? 4 : 2; }

    const Tensor * node_;
    std::size_t n_embd_;
    FloatType type_;
};

}  // namespace pysteer
