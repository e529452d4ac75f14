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

    // Calls visit(token, stream, row) for each row, all streams of a token before the next token; `row` is for load()
    // and store(). Rows lie stream by stream.
    template <typename Visit>
    void for_each(int64_t streams, Visit && visit) const {
        const int64_t tokens = count() / streams;
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t stream = 0; stream < streams; ++stream) {
                visit(token, stream, row(stream * tokens + token));
            }
        }
    }

    // The row itself if it is f32, else a copy in `scratch`, which has room for n_embd values.
    float * load(char * row, float * scratch) const noexcept;
    // Writes back what load() returned.
    void store(char * row, const float * values) const noexcept;

  private:
    char * row(int64_t number) const noexcept {
        const int64_t i1 = number % node_->ne[1];
        const int64_t plane = number / node_->ne[1];
        return static_cast<char *>(node_->data) + static_cast<std::size_t>(i1) * node_->nb[1] +
               static_cast<std::size_t>(plane % node_->ne[2]) * node_->nb[2] +
               static_cast<std::size_t>(plane / node_->ne[2]) * node_->nb[3];
    }
    std::size_t element_size() const noexcept { return type_ == FloatType::f32 ? 4 : 2; }

    const Tensor * node_;
    std::size_t n_embd_;
    FloatType type_;
};

}  // namespace pysteer
