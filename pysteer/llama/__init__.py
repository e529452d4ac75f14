"""llama.cpp with the native hook in its contexts."""
