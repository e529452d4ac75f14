#include "llama_abi.hpp"

#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace pysteer {
namespace {

class Library {
  public:
    Library(std::uintptr_t handle, const std::string & folder) : handle_(handle), folder_(folder) {}

    void * find(const char * name) const {
#ifdef _WIN32
        // GetProcAddress does not look into a module's dependencies, and ggml's functions are in separate libraries.
        auto module = reinterpret_cast<HMODULE>(handle_);
        if (auto * found = GetProcAddress(module, name)) {
            return reinterpret_cast<void *>(found);
        }
        for (const char * file : {"ggml-base.dll", "ggml.dll", "ggml-cpu.dll"}) {
            HMODULE loaded = GetModuleHandleA((folder_ + "\\" + file).c_str());
            if (loaded == nullptr) {
                loaded = GetModuleHandleA(file);
            }
            if (loaded != nullptr) {
                if (auto * found = GetProcAddress(loaded, name)) {
                    return reinterpret_cast<void *>(found);
                }
            }
        }
        return nullptr;
#else
        // dlsym on a handle searches the library and everything it depends on.
        return dlsym(reinterpret_cast<void *>(handle_), name);
#endif
    }

  private:
    std::uintptr_t handle_;
    std::string folder_;
};

std::mutex g_mutex;
std::optional<Library> g_library;
std::optional<Abi> g_abi;

Abi look_up(const Library & library) {
    Abi abi{};
    std::string missing;
    auto bind = [&](auto & function, const char * name) {
        void * address = library.find(name);
        if (address == nullptr) {
            missing += (missing.empty() ? "" : ", ") + std::string(name);
        }
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
    };
#define PYSTEER_BIND(name) bind(abi.name, #name)
    PYSTEER_BIND(ggml_version);
    PYSTEER_BIND(ggml_get_name);
    PYSTEER_BIND(ggml_op_desc);
    PYSTEER_BIND(ggml_type_name);
    PYSTEER_BIND(ggml_nelements);
    PYSTEER_BIND(ggml_nrows);
    PYSTEER_BIND(ggml_get_data);
    PYSTEER_BIND(ggml_fp16_to_fp32_row);
    PYSTEER_BIND(ggml_fp32_to_fp16_row);
    PYSTEER_BIND(ggml_bf16_to_fp32_row);
    PYSTEER_BIND(ggml_fp32_to_bf16_row);
    PYSTEER_BIND(ggml_backend_buffer_is_host);
    PYSTEER_BIND(ggml_backend_buffer_name);
    PYSTEER_BIND(ggml_backend_tensor_set);
    PYSTEER_BIND(ggml_backend_tensor_get);
    PYSTEER_BIND(ggml_init);
    PYSTEER_BIND(ggml_free);
    PYSTEER_BIND(ggml_tensor_overhead);
    PYSTEER_BIND(ggml_new_tensor_2d);
    PYSTEER_BIND(ggml_set_name);
    PYSTEER_BIND(ggml_add);
    PYSTEER_BIND(ggml_mul);
    PYSTEER_BIND(ggml_scale);
    PYSTEER_BIND(ggml_mul_mat);
    PYSTEER_BIND(ggml_backend_cpu_buffer_type);
    PYSTEER_BIND(ggml_backend_alloc_ctx_tensors_from_buft);
    PYSTEER_BIND(ggml_backend_buffer_free);
    const std::string required = missing;
    PYSTEER_BIND(ggml_add_id);
    PYSTEER_BIND(ggml_backend_buffer_get_type);
    PYSTEER_BIND(ggml_backend_buft_name);
    PYSTEER_BIND(ggml_backend_buft_get_device);
    PYSTEER_BIND(ggml_backend_dev_supports_op);
#undef PYSTEER_BIND
    abi.op_add_id = missing == required ? 0 : -1;  // read below
    missing = required;
    if (!missing.empty()) {
        throw std::runtime_error("the loaded llama.cpp lacks " + missing);
    }
    return abi;
}

// Makes tensors with the loaded library and compares their fields with `Tensor`.
void check_layout_and_read_ops(Abi & abi) {
    constexpr int64_t width = 8;
    constexpr int64_t height = 3;
    const auto type = static_cast<int32_t>(FloatType::f32);
    void * context = abi.ggml_init({abi.ggml_tensor_overhead() * 16, nullptr, /*no_alloc=*/true});
    if (context == nullptr) {
        throw std::runtime_error("ggml_init failed: no memory to check the layout of tensors");
    }
    void * buffer = nullptr;
    std::string wrong;
    auto expect = [&](bool holds, const char * field) {
        if (!holds) {
            wrong += (wrong.empty() ? "" : ", ") + std::string(field);
        }
    };

    Tensor * a = abi.ggml_new_tensor_2d(context, type, width, height);
    Tensor * b = abi.ggml_new_tensor_2d(context, type, width, height);
    Tensor * sum = abi.ggml_add(context, a, b);
    abi.ggml_set_name(a, "pysteer-layout-check");

    expect(abi.ggml_tensor_overhead() >= sizeof(Tensor), "size");
    expect(a->type == type && std::strcmp(abi.ggml_type_name(a->type), "f32") == 0, "type");
    expect(a->ne[0] == width && a->ne[1] == height && a->ne[2] == 1 && a->ne[3] == 1, "ne");
    expect(a->nb[0] == sizeof(float) && a->nb[1] == width * sizeof(float), "nb");
    expect(abi.ggml_nelements(a) == width * height && abi.ggml_nrows(a) == height, "nrows");
    expect(sum->src[0] == a && sum->src[1] == b && sum->src[2] == nullptr && a->src[0] == nullptr, "src");
    expect(std::strcmp(a->name, "pysteer-layout-check") == 0 && abi.ggml_get_name(a) == a->name, "name");
    if (wrong.empty()) {  // otherwise do not follow the pointers below
        abi.op_none = a->op;
        abi.op_add = sum->op;
        abi.op_mul = abi.ggml_mul(context, a, b)->op;
        abi.op_scale = abi.ggml_scale(context, a, 2.0f)->op;
        abi.op_mul_mat = abi.ggml_mul_mat(context, a, b)->op;
        if (abi.adds_by_id()) {
            Tensor * ids = abi.ggml_new_tensor_2d(context, Abi::type_i32, height, 1);
            expect(std::strcmp(abi.ggml_type_name(ids->type), "i32") == 0 && ids->nb[0] == sizeof(int32_t), "i32");
            const Tensor * by_id = abi.ggml_add_id(context, a, b, ids);
            expect(by_id->src[1] == b && by_id->src[2] == ids, "add_id");
            abi.op_add_id = by_id->op;
        }
        expect(std::strcmp(abi.ggml_op_desc(sum), "ADD") == 0 && std::strcmp(abi.ggml_op_desc(a), "NONE") == 0 &&
                   abi.op_add != abi.op_none && abi.op_mul != abi.op_add && abi.op_mul_mat != abi.op_mul,
               "op");
        buffer = abi.ggml_backend_alloc_ctx_tensors_from_buft(context, abi.ggml_backend_cpu_buffer_type());
        expect(buffer != nullptr && a->buffer == buffer && abi.ggml_backend_buffer_is_host(buffer), "buffer");
        expect(a->data != nullptr && abi.ggml_get_data(a) == a->data, "data");
    }
    if (buffer != nullptr) {
        abi.ggml_backend_buffer_free(buffer);
    }
    abi.ggml_free(context);
    if (!wrong.empty()) {
        throw std::runtime_error("ggml_tensor of ggml " + std::string(abi.ggml_version()) +
                                 " is not laid out as expected (" + wrong + ")");
    }
}

}  // namespace

void load_abi(std::uintptr_t library_handle, const std::string & library_folder) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    if (g_abi) {
        return;
    }
    const Library library(library_handle, library_folder);
    Abi candidate = look_up(library);
    check_layout_and_read_ops(candidate);
    g_library = library;
    g_abi = candidate;
}

const Abi & abi() {
    if (!g_abi) {
        throw std::runtime_error("load_abi() has not been called");
    }
    return *g_abi;
}

void * find_function(const std::string & name) {
    abi();
    return g_library->find(name.c_str());
}

void * buffer_of(const Tensor * tensor) noexcept {
    return tensor->buffer != nullptr || tensor->view_src == nullptr ? tensor->buffer : tensor->view_src->buffer;
}

bool is_on_host(const Tensor * tensor) {
    void * buffer = buffer_of(tensor);
    return buffer != nullptr && abi().ggml_backend_buffer_is_host(buffer);
}

}  // namespace pysteer
