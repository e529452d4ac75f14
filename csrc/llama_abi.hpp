// The few C functions and the one struct of llama.cpp that pysteer uses.
//
// pysteer links to no llama.cpp. It looks the functions up in the library that llama_cpp has already loaded, so one
// build of pysteer serves every build of llama-cpp-python (CPU, CUDA, Metal, Vulkan, RPC).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace pysteer {

// ggml_tensor in the layout of ggml 0.25, for fields without an accessor (op, sources, buffer, strides). load_abi()
// throws if a tensor made by the loaded library does not match.
struct Tensor {
    int32_t type;
    void * buffer;
    int64_t ne[4];  // elements per dimension
    size_t nb[4];   // stride in bytes per dimension
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    Tensor * src[10];
    Tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};

// ggml_type: the types of activations in llama.cpp's graphs.
enum class FloatType : int32_t { f32 = 0, f16 = 1, bf16 = 30 };

struct InitParams {  // ggml_init_params
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

struct Abi {
    const char * (*ggml_version)();
    const char * (*ggml_get_name)(const Tensor *);
    const char * (*ggml_op_desc)(const Tensor *);
    const char * (*ggml_type_name)(int32_t);
    int64_t (*ggml_nelements)(const Tensor *);
    int64_t (*ggml_nrows)(const Tensor *);
    void * (*ggml_get_data)(const Tensor *);
    void (*ggml_fp16_to_fp32_row)(const uint16_t *, float *, int64_t);
    void (*ggml_fp32_to_fp16_row)(const float *, uint16_t *, int64_t);
    void (*ggml_bf16_to_fp32_row)(const uint16_t *, float *, int64_t);
    void (*ggml_fp32_to_bf16_row)(const float *, uint16_t *, int64_t);
    bool (*ggml_backend_buffer_is_host)(void *);
    const char * (*ggml_backend_buffer_name)(void *);
    void (*ggml_backend_tensor_set)(Tensor *, const void *, size_t, size_t);
    void (*ggml_backend_tensor_get)(const Tensor *, void *, size_t, size_t);

    // For the tensors with which load_abi() checks the struct above.
    void * (*ggml_init)(InitParams);
    void (*ggml_free)(void *);
    size_t (*ggml_tensor_overhead)();
    Tensor * (*ggml_new_tensor_2d)(void *, int32_t, int64_t, int64_t);
    Tensor * (*ggml_set_name)(Tensor *, const char *);
    Tensor * (*ggml_add)(void *, Tensor *, Tensor *);
    Tensor * (*ggml_mul)(void *, Tensor *, Tensor *);
    Tensor * (*ggml_scale)(void *, Tensor *, float);
    Tensor * (*ggml_mul_mat)(void *, Tensor *, Tensor *);
    void * (*ggml_backend_cpu_buffer_type)();
    void * (*ggml_backend_alloc_ctx_tensors_from_buft)(void *, void *);
    void (*ggml_backend_buffer_free)(void *);

    // For row tables. Older versions of llama.cpp may lack some; see adds_by_id().
    Tensor * (*ggml_add_id)(void *, Tensor *, Tensor *, Tensor *);
    void * (*ggml_backend_buffer_get_type)(void *);
    const char * (*ggml_backend_buft_name)(void *);
    void * (*ggml_backend_buft_get_device)(void *);
    bool (*ggml_backend_dev_supports_op)(void *, const Tensor *);

    // ggml_op values, read from nodes that the loaded library made: the enumeration differs between versions.
    int32_t op_none;
    int32_t op_add;
    int32_t op_mul;
    int32_t op_scale;
    int32_t op_mul_mat;
    int32_t op_add_id;  // -1: the library lacks a function for row tables

    static constexpr int32_t type_i32 = 26;  // ggml_type, checked by load_abi()

    bool adds_by_id() const noexcept { return op_add_id >= 0; }
};

// Fills the table from the shared library with this handle (dlopen's, or an HMODULE). On Windows, where the handle does
// not reach ggml's own libraries, they are searched for in `library_folder`. Throws std::runtime_error that names the
// missing functions or the fields that do not match. Free after the first call.
void load_abi(std::uintptr_t library_handle, const std::string & library_folder);

// The table; throws std::runtime_error before a successful load_abi().
const Abi & abi();

// The address of another function of that library, or null.
void * find_function(const std::string & name);

// The buffer that holds a tensor's values, or null.
void * buffer_of(const Tensor * tensor) noexcept;
bool is_on_host(const Tensor * tensor);

}  // namespace pysteer
