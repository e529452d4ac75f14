#include "row_access.hpp"

#include <limits>

namespace pysteer {

std::string HostRows::problem() const {
    if (!is_on_host(node_)) {
        return "moved to memory that is not on the host";
    }
    if (type_ != FloatType::f32 && type_ != FloatType::f16 && type_ != FloatType::bf16) {
        return std::string("has type ") + abi().ggml_type_name(node_->type) + "; f32, f16 or bf16 expected";
    }
    if (static_cast<std::size_t>(node_->ne[0]) != n_embd_ || node_->nb[0] != element_size()) {
        return "is not a contiguous row of " + std::to_string(n_embd_) + " values";
    }
    return {};
}

float HostRows::limit() const noexcept {
    return type_ == FloatType::f16 ? 65504.0f : std::numeric_limits<float>::max();
}

float * HostRows::load(char * row, float * scratch) const noexcept {
    if (type_ == FloatType::f32) {
        return reinterpret_cast<float *>(row);
    }
    const auto * half = reinterpret_cast<const uint16_t *>(row);
    const auto width = static_cast<int64_t>(n_embd_);
    if (type_ == FloatType::f16) {
        abi().ggml_fp16_to_fp32_row(half, scratch, width);
    } else {
        abi().ggml_bf16_to_fp32_row(half, scratch, width);
    }
    return scratch;
}

void HostRows::store(char * row, const float * values) const noexcept {
    auto * half = reinterpret_cast<uint16_t *>(row);
    const auto width = static_cast<int64_t>(n_embd_);
    if (type_ == FloatType::f16) {
        abi().ggml_fp32_to_fp16_row(values, half, width);
    } else if (type_ == FloatType::bf16) {
        abi().ggml_fp32_to_bf16_row(values, half, width);
    }
}

}  // namespace pysteer
