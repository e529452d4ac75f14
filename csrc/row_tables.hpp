// Steering of each row by its own direction inside the uncut graph.
//
// Where llama.cpp adds its control vector, ADD(input, vector), the node becomes ADD_ID(input, table, ids): the table
// holds the distinct sums of directions of the rows, row 0 is zero, and ids holds a table row for each row of the node.
// Both are in the memory of the device that computes the node. Nothing is asked for, so the graph runs uncut; a sum is
// uploaded when a row first needs it, and ids when they change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "llama_abi.hpp"

namespace pysteer {

class RowTables {
  public:
    RowTables() = default;
    ~RowTables() { release(); }
    RowTables(const RowTables &) = delete;
    RowTables & operator=(const RowTables &) = delete;

    // Makes room for a model; frees all tables.
    void resize(std::size_t n_layer, std::size_t n_embd);
    // Frees all tables; no graph may be computed afterwards that was changed.
    void release() noexcept;

    // True after the first change() of a node.
    bool used() const noexcept { return !vectors_.empty(); }
    // Gives a node back that change() changed, as llama.cpp made it. llama.cpp keeps graphs and computes them again.
    void restore(Tensor * node) noexcept;

    // Starts the table of a layer for a node that adds the layer's control vector; returns whether the node's device
    // can add by rows. Throws std::runtime_error if the device has no memory for the table.
    bool begin(Tensor * node, std::size_t layer);
    // The table row that holds the sum of a plan's directions times these factors, one for each op at the layer.
    std::optional<int32_t> find(uint64_t plan, const float * factors, std::size_t n_factors) noexcept;
    // Puts a sum, n_embd values, into a table row that the node does not use; nullopt if it uses all rows that a table
    // can have. Throws std::runtime_error as begin() does.
    std::optional<int32_t> add(uint64_t plan, const float * factors, std::size_t n_factors, const float * sum);
    // Has the node add table row ids[k] to its row k; ids holds streams times as many values as the node has tokens.
    void change(Tensor * node, const std::vector<int32_t> & ids, int64_t streams);

    // The most rows of a table, row 0 included.
    static constexpr int64_t most_rows = 128;

  private:
    struct Entry {
        uint64_t plan = 0;  // Plan::id(); 0: free
        std::vector<float> factors;
        uint64_t used = 0;  // the last node that needed the row
    };
    struct Layer {
        void * context = nullptr;  // ggml's, of the two tensors
        void * buffer = nullptr;
        void * type = nullptr;  // of the buffer: the device
        Tensor * table = nullptr;
        Tensor * ids = nullptr;
        std::vector<Entry> entries;     // by table row
        int64_t room = 0;               // for ids
        std::vector<int32_t> uploaded;  // the values of ids
        std::optional<bool> supported;
    };

    void allocate(Layer & layer, int64_t n_rows, int64_t n_ids);
    void reallocate(Layer & layer, int64_t n_rows, int64_t n_ids);
    bool supports(const Tensor * node, const Layer & layer) const;
    static void release(Layer & layer) noexcept;

    std::size_t n_embd_ = 0;
    std::vector<Layer> layers_;
    Layer * current_ = nullptr;  // of begin()
    std::size_t current_layer_ = 0;
    uint64_t node_ = 0;  // the number of the node that began
    // By changed node: the control vector that it adds.
    std::unordered_map<const Tensor *, Tensor *> vectors_;
};

}  // namespace pysteer
