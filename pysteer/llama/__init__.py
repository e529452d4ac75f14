"""llama.cpp with the native hook in its contexts.

- `versions`: ties to a version of llama-cpp-python
- `batch`, `memory`, `vocabulary`: llama.cpp's batches, cache and tokens
- `context`, `capture`: the hooked context
- `hooked`: `HookedLlama`, a `llama_cpp.Llama` around one
"""
