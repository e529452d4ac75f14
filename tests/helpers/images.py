"""A chat handler that decodes images straight on the context, as llama-cpp-python's own do."""

import ctypes
from contextlib import closing, contextmanager

import llama_cpp
import numpy as np
import pytest
from exactness import native_control_vector
from llama_cpp import llama_chat_format

N_ROWS = 5  # of an image

DRAWS_FROM_LOGITS = "_requires_eval" in llama_cpp.Llama.__init__.__code__.co_names
needs_kept_logits = pytest.mark.skipif(
    not DRAWS_FROM_LOGITS,
    reason="this llama-cpp-python evaluates a prompt's last token twice; a recurrent model cannot",
)


def image_rows(seed, n_embd=64):
    """The rows that the projector would make of an image."""
    return np.random.default_rng(seed).standard_normal((N_ROWS, n_embd)).astype(np.float32)


def decode_rows(llama, rows, position):
    """Decode rows that have no tokens and no logits, from a position on or at one for each."""
    n_rows, n_embd = rows.shape
    positions = np.arange(n_rows) + position if np.ndim(position) == 0 else position
    batch = llama_cpp.llama_batch_init(n_rows, n_embd, 1)
    try:
        batch.n_tokens = n_rows
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        for row in range(n_rows):
            batch.pos[row] = positions[row]
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = False
        assert llama_cpp.llama_decode(llama._ctx.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)


def decode_image(llama, seed, *, n_batch=None, non_causal=False):
    """Decode rows without tokens and without logits, as mtmd_helper_eval_chunk_single does."""
    rows, n_batch = image_rows(seed, llama.n_embd()), n_batch or llama.n_batch
    if non_causal:
        llama_cpp.llama_set_causal_attn(llama._ctx.ctx, False)
    try:
        for start in range(0, N_ROWS, n_batch):
            decode_rows(llama, rows[start : start + n_batch], llama.n_tokens + start)
    finally:
        if non_causal:
            llama_cpp.llama_set_causal_attn(llama._ctx.ctx, True)
    llama.n_tokens += N_ROWS


def parts_of(messages):
    """The texts of a chat, and the seeds of its images, in order."""
    for one in messages:
        content = one["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            yield int(part["image_url"]) if part["type"] == "image_url" else part["text"]
        yield "\n"


class ImageHandler:
    """Follows Llava15ChatHandler from the reset of the model on.

    A part of type "image_url" has the seed of its image as the URL.

    Attributes:
        calls: number of calls.
    """

    def __init__(self, **options):
        self.options = options
        self.calls = 0

    def image(self, llama, seed):
        decode_image(llama, seed, **self.options)

    def __call__(self, *, llama, messages, stream=False, **options):
        self.calls += 1
        llama.reset()
        llama._ctx.kv_cache_clear()
        for part in parts_of(messages):
            if isinstance(part, int):
                self.image(llama, part)
            else:
                llama.eval(llama.tokenize(part.encode(), add_bos=False))
        prompt = llama.input_ids[: llama.n_tokens].tolist()
        names = ("temperature", "max_tokens", "seed", "logit_bias", "logits_processor")
        asked = {name: options[name] for name in names}
        completion = llama.create_completion(prompt=prompt, stream=stream, **asked)
        return llama_chat_format._convert_completion_to_chat(completion, stream=stream)


def message(*parts, role="user"):
    """A message of texts, and of images by their seeds."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": str(part)}
        for part in parts
    ]
    return {"role": role, "content": content}


def rows_of(llama, messages):
    """The prompt of a chat row by row: tokens, and rows of images."""
    rows = []
    for part in parts_of(messages):
        if isinstance(part, int):
            rows += list(image_rows(part, llama.n_embd()))
        else:
            rows += llama.tokenize(part.encode(), add_bos=False)
    return rows


def answer_row_by_row(path, messages, vector, factor, n_new, banned, **arguments):
    """Compute a chat with plain llama.cpp, each row under a control vector of its own.

    Args:
        vector: a `SteeringVector` of layers >= 1.
        factor: function from position and number of prompt rows to a factor of the vector.
        n_new: number of tokens to write.
        banned: tokens never to write.

    Returns:
        The logits after the last prompt row and each token written, (n_new, n_vocab), and the
        tokens.
    """
    with closing(llama_cpp.Llama(str(path), **arguments)) as llama:
        rows = rows_of(llama, messages)
        n_prompt, logits, written = len(rows), [], []
        set_to = None
        for position in range(n_prompt + n_new - 1):
            row = rows[position]
            strength = factor(position, n_prompt)
            if strength != set_to:
                n_layer = llama_cpp.llama_model_n_layer(llama.model)
                native_control_vector(llama, vector * strength, n_layer)
                set_to = strength
            if isinstance(row, np.ndarray):
                decode_rows(llama, row[None], position)
                llama.n_tokens += 1
            else:
                llama.eval([row])
            if position >= n_prompt - 1:
                logits.append(llama.scores[llama.n_tokens - 1].copy())
                allowed = logits[-1].copy()
                allowed[list(banned)] = -np.inf
                written.append(int(allowed.argmax()))
                rows.append(written[-1])
        return np.array(logits), written


@contextmanager
def recorded_rows(path, node, **arguments):
    """A plain `llama_cpp.Llama`, and a list of the rows of a node in every later decode.

    Reads through a callback of its own, in Python.
    """
    lib = llama_cpp.llama_cpp._lib
    name_of = lib.ggml_get_name
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    count_of = lib.ggml_nelements
    count_of.restype, count_of.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    get = lib.ggml_backend_tensor_get  # wherever the node is
    get.restype = None
    get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    found, ready = [], []

    def callback(tensor, ask, _):
        if name_of(tensor) != node.encode():
            return not ask
        if not ask and ready:
            values = np.empty((count_of(tensor) // llama.n_embd(), llama.n_embd()), np.float32)
            get(tensor, values.ctypes.data, 0, values.nbytes)
            found.extend(values)
        return True

    native = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    kept = native(callback)
    module = llama_cpp.llama_cpp
    defaults = module.llama_context_default_params

    def with_callback():
        params = defaults()
        params.cb_eval = ctypes.cast(kept, type(params.cb_eval))
        return params

    module.llama_context_default_params = with_callback
    try:
        llama = llama_cpp.Llama(str(path), **arguments)
    finally:
        module.llama_context_default_params = defaults
    with closing(llama):
        ready.append(True)
        yield llama, found
