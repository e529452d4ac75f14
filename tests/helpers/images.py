"""A chat handler that decodes images straight on the context, as llama-cpp-python's own do."""

import ctypes

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format

N_ROWS = 5  # of an image


def decode_image(llama, seed, n_embd=64):
    """What mtmd_helper_eval_chunk_single does: the rows have no tokens and no logits."""
    rows = np.random.default_rng(seed).standard_normal((N_ROWS, n_embd)).astype(np.float32)
    batch = llama_cpp.llama_batch_init(N_ROWS, n_embd, 1)
    try:
        batch.n_tokens = N_ROWS
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        for row in range(N_ROWS):
            batch.pos[row] = llama.n_tokens + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = False
        assert llama_cpp.llama_decode(llama._ctx.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    llama.n_tokens += N_ROWS


class ImageHandler:
    """Follows Llava15ChatHandler from the reset of the model on.

    A part of type "image_url" has the seed of its image as the URL.
    """

    def __call__(self, *, llama, messages, stream=False, **options):
        llama.reset()
        llama._ctx.kv_cache_clear()
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "image_url":
                    decode_image(llama, int(part["image_url"]))
                else:
                    llama.eval(llama.tokenize(part["text"].encode(), add_bos=False))
            llama.eval(llama.tokenize(b"\n", add_bos=False))
        prompt = llama.input_ids[: llama.n_tokens].tolist()
        names = ("temperature", "max_tokens", "seed", "logit_bias", "logits_processor")
        asked = {name: options[name] for name in names}
        completion = llama.create_completion(prompt=prompt, stream=stream, **asked)
        return llama_chat_format._convert_completion_to_chat(completion, stream=stream)


def message(*parts):
    """A message of texts, and of images by their seeds."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": str(part)}
        for part in parts
    ]
    return {"role": "user", "content": content}
