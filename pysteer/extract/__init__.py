"""Learning directions and routers: from transformers models, or from GGUF models without torch."""
