#include "row_access.hpp"

#include <limits>

namespace pysteer {

NodeRows::NodeRows(Tensor * node, std::size_t n_embd, RowCopies & copies)
    : node_(node),
      n_embd_(n_embd),
      type_(static_cast<FloatType>(node->type)),
      on_host_(is_on_host(node)),
      copies_(copies) {
    if (!on_host_) {
        copies_.index.assign(static_cast<std::size_t>(count()), -1);
    }
}

std::string NodeRows::problem() const {
    if (buffer_of(node_) == nullptr) {
        return "has no memory";
    }
    if (type_ != FloatType::f32 && type_ != FloatType::f16 && type_ != FloatType::bf16) {
        return std::string("has type ") + abi().ggml_type_name(node_->type) + "; f32, f16 or bf16 expected";
    }
    if (static_cast<std::size_t>(node_->ne[0]) != n_embd_ || node_->nb[0] != element_size()) {
        return "is not a contiguous row of " + std::to_string(n_embd_) + " values";
    }
    return {};
}

float NodeRows::limit() const noexcept {
    return type_ == FloatType::f16 ? 65504.0f : std::numeric_limits<float>::max();
}

char * NodeRows::row(int64_t number) const noexcept {
    if (on_host_) {
        return static_cast<char *>(node_->data) + offset(number);
    }
    const auto place = static_cast<std::size_t>(copies_.index[static_cast<std::size_t>(number)]);
    return copies_.bytes.data() + place * row_size();
}

float * NodeRows::load(int64_t number, float * scratch) const noexcept {
    char * from = row(number);
    if (type_ == FloatType::f32) {
        return reinterpret_cast<float *>(from);
    }
    const auto * half = reinterpret_cast<const uint16_t *>(from);
    const auto width = static_cast<int64_t>(n_embd_);
    if (type_ == FloatType::f16) {
        abi().ggml_fp16_to_fp32_row(half, scratch, width);
    } else {
        abi().ggml_bf16_to_fp32_row(half, scratch, width);
    }
    return scratch;
}

void NodeRows::store(int64_t number, const float * values) noexcept {
    auto * half = reinterpret_cast<uint16_t *>(row(number));
    const auto width = static_cast<int64_t>(n_embd_);
    if (type_ == FloatType::f16) {
        abi().ggml_fp32_to_fp16_row(values, half, width);
    } else if (type_ == FloatType::bf16) {
        abi().ggml_fp32_to_bf16_row(values, half, width);
    }
    if (!on_host_) {
        copies_.changed[static_cast<std::size_t>(copies_.index[static_cast<std::size_t>(number)])] = 1;
    }
}

// ---- rows that are not in host memory
// ---------------------------------------------------------------------------------

template <typename Chosen, typename Visit>
void NodeRows::for_each_run(Chosen && chosen, Visit && visit) const {
    const std::vector<int64_t> & numbers = copies_.numbers;
    for (std::size_t first = 0; first < numbers.size();) {
        if (!chosen(first)) {
            ++first;
            continue;
        }
        std::size_t end = first + 1;
        while (end < numbers.size() && chosen(end) &&
               offset(numbers[end]) == offset(numbers[first]) + (end - first) * row_size()) {
            ++end;
        }
        visit(first, end - first);
        first = end;
    }
}

// Copies the rows whose index is not -1, which get their index.
void NodeRows::copy_wanted() {
    copies_.numbers.clear();
    for (int64_t number = 0; number < count(); ++number) {
        int64_t & index = copies_.index[static_cast<std::size_t>(number)];
        if (index >= 0) {
            index = static_cast<int64_t>(copies_.numbers.size());
            copies_.numbers.push_back(number);
        }
    }
    copies_.changed.assign(copies_.numbers.size(), 0);
    if (copies_.bytes.size() < copies_.numbers.size() * row_size()) {
        copies_.bytes.resize(copies_.numbers.size() * row_size());
    }
    for_each_run([](std::size_t) { return true; },
                 [&](std::size_t first, std::size_t n_rows) {
                     abi().ggml_backend_tensor_get(node_, copies_.bytes.data() + first * row_size(),
                                                   offset(copies_.numbers[first]), n_rows * row_size());
                 });
}

void NodeRows::write_back() const {
    if (on_host_) {
        return;
    }
    for_each_run([&](std::size_t place) { return copies_.changed[place] != 0; },
                 [&](std::size_t first, std::size_t n_rows) {
                     abi().ggml_backend_tensor_set(node_, copies_.bytes.data() + first * row_size(),
                                                   offset(copies_.numbers[first]), n_rows * row_size());
                 });
}

}  // namespace pysteer
