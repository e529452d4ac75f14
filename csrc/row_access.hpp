// The rows of one node as float32, from any type and layout, in host memory or not.
//
// The hook reaches the values of a tensor through NodeRows alone. Rows in host memory are used in place. Of a tensor
// elsewhere, the rows that are wanted are copied to the host, and those that change are copied back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "llama_abi.hpp"

namespace pysteer {

// The memory for copies of rows. Kept from node to node, so that nothing is allocated once warm.
struct RowCopies {
    std::vector<int64_t> numbers;  // of the rows, ascending
    std::vector<int64_t> index;    // by number: place in `numbers`; -1: not copied
    std::vector<uint8_t> changed;  // by place in `numbers`
    std::vector<char> bytes;       // row by row, without gaps
};

// The rows of a node, each n_embd values of f32, f16 or bf16. Rows are numbered as they lie in memory.
class NodeRows {
  public:
    NodeRows(Tensor * node, std::size_t n_embd, RowCopies & copies);

    // The reason why the rows cannot be read ("has type i32; ..."), or "". With a reason, call none of the functions
    // below but count().
    std::string problem() const;

    int64_t count() const noexcept { return node_->ne[1] * node_->ne[2] * node_->ne[3]; }
    // The largest absolute value that a row can hold.
    float limit() const noexcept;

    // Copies the rows for which wanted(token, stream) is true to the host. Does nothing for rows in host memory.
    template <typename Wanted>
    void fetch(int64_t streams, Wanted && wanted) {
        if (on_host_) {
            return;
        }
        for_each_number(streams, [&](int64_t token, int64_t stream, int64_t number) {
            copies_.index[static_cast<std::size_t>(number)] = wanted(token, stream) ? 0 : -1;
        });
        copy_wanted();
    }

    // Calls visit(token, stream, number) for each row, or each copied row; all streams of a token before the next
    // token. `number` is for load() and store(). Rows lie stream by stream.
    template <typename Visit>
    void for_each(int64_t streams, Visit && visit) const {
        for_each_number(streams, [&](int64_t token, int64_t stream, int64_t number) {
            if (on_host_ || copies_.index[static_cast<std::size_t>(number)] >= 0) {
                visit(token, stream, number);
            }
        });
    }

    // The row itself if it is f32, else its values in `scratch`, which has room for n_embd.
    float * load(int64_t number, float * scratch) const noexcept;
    // Writes back the values that load() returned.
    void store(int64_t number, const float * values) noexcept;
    // Copies the stored rows back to the node. Does nothing for rows in host memory.
    void write_back() const;

  private:
    template <typename Visit>
    void for_each_number(int64_t streams, Visit && visit) const {
        const int64_t tokens = count() / streams;
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t stream = 0; stream < streams; ++stream) {
                visit(token, stream, stream * tokens + token);
            }
        }
    }
    // Of a row in its tensor, in bytes.
    std::size_t offset(int64_t number) const noexcept {
        const int64_t i1 = number % node_->ne[1];
        const int64_t plane = number / node_->ne[1];
        return static_cast<std::size_t>(i1) * node_->nb[1] +
               static_cast<std::size_t>(plane % node_->ne[2]) * node_->nb[2] +
               static_cast<std::size_t>(plane / node_->ne[2]) * node_->nb[3];
    }
    // The row in host memory: the tensor's, or the copy.
    char * row(int64_t number) const noexcept;
    void copy_wanted();
    // Calls visit(first, count) for each run of chosen copies that lie one behind the other in the tensor.
    template <typename Chosen, typename Visit>
    void for_each_run(Chosen && chosen, Visit && visit) const;

    std::size_t element_size() const noexcept { return type_ == FloatType::f32 ? 4 : 2; }
    std::size_t row_size() const noexcept { return n_embd_ * element_size(); }

    Tensor * node_;
    std::size_t n_embd_;
    FloatType type_;
    bool on_host_;
    RowCopies & copies_;
};

}  // namespace pysteer
