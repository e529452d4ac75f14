"""Write small random-weight GGUF models for tests and benchmarks, without any download.

The models have the real structure of their family (grouped-query attention, biases, post-norms,
sliding windows, fused projections), so that tests meet every tensor of the family. Norm weights and
biases are random too: leaving a tensor out changes the logits.

For each family in ``TRANSFORMERS_FAMILIES`` an F32 file gives the same logits in llama.cpp (CPU,
F32 KV cache) and in transformers (``from_pretrained(folder, gguf_file=name)``). Logits of size 1
differ by 1e-5 in llama, qwen2, qwen3, phi3, mamba and lfm2, and by 2e-3 in gemma2, gemma3 and gpt2,
whose GELU llama.cpp's CPU backend reads from a table in half precision. Transformers does not read
gemma3n from GGUF.

usage: python tools/tiny_models.py tiny llama out.gguf --n-embd 64 --dtype F32
       python tools/tiny_models.py bench out.gguf --shape 1.1b --ftype Q4_K_M
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import typer
from gguf import GGUFWriter, LlamaFileType
from quantized import FTYPES, quantize
from tiny_vocabulary import CONTROL, Vocabulary, copied_vocabulary, synthetic_vocabulary

Array = npt.NDArray[np.float16 | np.float32]


@dataclass(frozen=True)
class Family:
    """Architecture, by its differences from Llama; the defaults are Llama's."""

    rope_base: float | None = 10_000.0  # None: no rotary embedding
    head_dim: int | None = None  # None: n_embd / n_head
    grouped: bool = True  # fewer key/value heads than query heads
    tied: bool = False  # no output.weight: token_embd.weight is used twice
    gpt: bool = False  # LayerNorm for RMSNorm, learned positions, biases on all projections
    fused_qkv: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head
    post_norm: bool = False  # RMSNorm on the attention and FFN outputs, before the residual add
    ffn: Literal["gated", "fused", "plain"] = "gated"  # fused: gate and up in one tensor
    window: int | None = None  # sliding window, tokens; the pattern over layers is llama.cpp's own
    softcap: bool = False  # of attention scores and of logits
    recurrent: bool = False  # Mamba blocks: no attention and no FFN
    hybrid: bool = False  # a short convolution in place of attention, except in every third block
    streams: bool = False  # Gemma 3n: four rows of the residual for a token, and inputs by layer

    def has_attention(self, layer: int) -> bool:
        """True if a block has attention; a block with a convolution instead has an FFN, too."""
        return not self.recurrent and (not self.hybrid or layer % 3 == 2)


# Transformers 5.23 takes these values from the real models, not from the file, so the table and
# _metadata have the real values: Qwen 3's head_dim, Gemma's attention scale 1/sqrt(256),
# Gemma 2's softcaps, Gemma 3's rope base of sliding layers, GPT-2's n_ff and number of positions.
# Gemma 2 slides on even layers; Gemma 3 on all but every sixth: a full one needs n_layer >= 6.
# The window is far shorter than a real one so that a short prompt outgrows it.
_TABLE: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(rope_base=1e6, qkv_bias=True),
    "qwen3": Family(rope_base=1e6, head_dim=128, qk_norm=True),
    "gemma2": Family(head_dim=256, tied=True, post_norm=True, window=16, softcap=True),
    "gemma3": Family(
        rope_base=1e6, head_dim=256, tied=True, qk_norm=True, post_norm=True, window=16
    ),
    "gemma3n": Family(
        rope_base=1e6,
        head_dim=256,
        tied=True,
        qk_norm=True,
        post_norm=True,
        window=16,
        streams=True,
    ),
    "phi3": Family(fused_qkv=True, ffn="fused"),
    "gpt2": Family(rope_base=None, grouped=False, tied=True, gpt=True, fused_qkv=True, ffn="plain"),
    "mamba": Family(rope_base=None, tied=True, recurrent=True),
    "lfm2": Family(rope_base=1e6, tied=True, qk_norm=True, hybrid=True),
}
FAMILIES: tuple[str, ...] = tuple(_TABLE)
TRANSFORMERS_FAMILIES: tuple[str, ...] = tuple(name for name in FAMILIES if name != "gemma3n")

# name: n_layer, n_embd, n_ff, n_head, n_kv
BENCH_SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "1.1b": (16, 2048, 5632, 32, 8),
    "small": (12, 768, 2048, 12, 4),
}

_ALTUP, _PER_LAYER, _LAUREL = 4, 256, 64  # Gemma 3n's own streams, input of a layer, and rank
_SSM_CONV, _SSM_STATE = 4, 16  # Mamba's own kernel width and state size
_SHORT_CONV = 3  # LFM2's own kernel width
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Larger tensors repeat this many random values, so that only the disk limits writing at 1.1B. The
# number is prime: rows do not line up with the repeats.
_BLOCK = 1_000_003


@dataclass(frozen=True)
class Dims:
    """Sizes of one model, in elements; ``n_ctx`` in tokens."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: mean + std * N(0, 1), with its shape in numpy order (rows, columns)."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    f32: bool = False  # llama.cpp needs it in F32 whatever the file's type


def _matrix(name: str, rows: int, cols: int, gain: float = 1.0) -> Tensor:
    """Projection whose output has about ``gain`` times the standard deviation of its input."""
    return Tensor(f"{name}.weight", (rows, cols), gain / cols**0.5)


def _norm(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.weight", (size,), 0.2, 1.0, f32=True)


def _bias(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.bias", (size,), 0.2, f32=True)


def _attention(p: str, fam: Family, d: Dims) -> Iterator[Tensor]:
    """Attention tensors of one block; ``p`` is the name's prefix, "blk.N."."""
    q, kv = d.n_head * d.head_dim, d.n_kv * d.head_dim
    yield _norm(p + "attn_norm", d.n_embd)
    # Scores of size 2 or so: with smaller scores, random weights leave attention almost uniform.
    for name, rows in [("qkv", q + 2 * kv)] if fam.fused_qkv else [("q", q), ("k", kv), ("v", kv)]:
        yield _matrix(f"{p}attn_{name}", rows, d.n_embd, 1.0 if name == "v" else 1.5)
        if fam.qkv_bias or fam.gpt:
            yield _bias(f"{p}attn_{name}", rows)
    if fam.qk_norm:
        yield _norm(p + "attn_q_norm", d.head_dim)
        yield _norm(p + "attn_k_norm", d.head_dim)
    yield _matrix(p + "attn_output", d.n_embd, q)
    if fam.gpt:
        for name in ("attn_norm", "attn_output"):
            yield _bias(p + name, d.n_embd)
    if fam.post_norm:
        yield _norm(p + "post_attention_norm", d.n_embd)


def _short_convolution(p: str, d: Dims) -> Iterator[Tensor]:
    """Short convolution, LFM2's replacement of attention in most blocks."""
    yield _norm(p + "attn_norm", d.n_embd)
    yield _matrix(p + "shortconv.in_proj", 3 * d.n_embd, d.n_embd)
    yield Tensor(p + "shortconv.conv.weight", (d.n_embd, _SHORT_CONV), 0.5, f32=True)
    yield _matrix(p + "shortconv.out_proj", d.n_embd, d.n_embd)


def _ffn(p: str, fam: Family, d: Dims) -> Iterator[Tensor]:
    """FFN tensors of one block."""
    yield _norm(p + "ffn_norm", d.n_embd)
    if fam.ffn == "gated":
        yield _matrix(p + "ffn_gate", d.n_ff, d.n_embd)
    yield _matrix(p + "ffn_up", d.n_ff * (2 if fam.ffn == "fused" else 1), d.n_embd)
    yield _matrix(p + "ffn_down", d.n_embd, d.n_ff)
    if fam.post_norm:
        yield _norm(p + "post_ffw_norm", d.n_embd)
    if fam.gpt:
        for name in ("ffn_norm", "ffn_down"):
            yield _bias(p + name, d.n_embd)
        yield _bias(p + "ffn_up", d.n_ff)


def _stream_model(d: Dims) -> Iterator[Tensor]:
    """Tensors of Gemma 3n around its blocks."""
    for name in ("altup_proj", "altup_unembd_proj"):
        yield Tensor(f"{name}.weight", (_ALTUP - 1, d.n_embd, d.n_embd), d.n_embd**-0.5)
    width = _PER_LAYER * d.n_layer
    yield Tensor("per_layer_token_embd.weight", (d.n_vocab, width), _PER_LAYER**-0.5)
    yield _matrix("per_layer_model_proj", width, d.n_embd)
    yield _norm("per_layer_proj_norm", _PER_LAYER)


def _stream_block(p: str, d: Dims) -> Iterator[Tensor]:
    """Tensors of a block of Gemma 3n besides those of Gemma 3."""
    yield _matrix(p + "inp_gate", _PER_LAYER, d.n_embd)
    yield _matrix(p + "proj", d.n_embd, _PER_LAYER)
    yield _norm(p + "post_norm", d.n_embd)
    yield Tensor(p + "altup_correct_coef.weight", (_ALTUP, _ALTUP), 0.5, f32=True)
    yield _norm(p + "altup_correct_scale", d.n_embd)
    yield Tensor(p + "altup_predict_coef.weight", (_ALTUP**2, _ALTUP), 0.5, f32=True)
    yield _matrix(p + "altup_router", _ALTUP, d.n_embd, d.n_embd**0.5)
    yield _norm(p + "altup_router_norm", d.n_embd)
    yield _matrix(p + "laurel_l", _LAUREL, d.n_embd)
    yield _matrix(p + "laurel_r", d.n_embd, _LAUREL)
    yield _norm(p + "laurel_post_norm", d.n_embd)


def _mamba(p: str, d: Dims) -> Iterator[Tensor]:
    """Tensors of one Mamba block, of inner size 2 n_embd."""
    inner, rank = 2 * d.n_embd, d.n_embd // 16
    yield _norm(p + "attn_norm", d.n_embd)  # the name llama.cpp gives the block's only norm
    yield _matrix(p + "ssm_in", 2 * inner, d.n_embd)
    yield Tensor(p + "ssm_conv1d.weight", (inner, _SSM_CONV), 0.5, f32=True)
    yield _bias(p + "ssm_conv1d", inner)
    yield _matrix(p + "ssm_x", rank + 2 * _SSM_STATE, inner)
    yield _matrix(p + "ssm_dt", inner, rank)
    yield Tensor(p + "ssm_dt.bias", (inner,), 0.5, -2.0, f32=True)  # softplus gives steps near 0.1
    yield Tensor(p + "ssm_a", (inner, _SSM_STATE), 0.1, -1.0, f32=True)  # must be below zero
    yield Tensor(p + "ssm_d", (inner,), 0.2, 1.0, f32=True)
    yield _matrix(p + "ssm_out", d.n_embd, inner)


def _tensors(fam: Family, d: Dims) -> Iterator[Tensor]:
    """Every tensor of the model, in file order."""
    # Blocks meet embeddings of size 1: Gemma's graph, alone, multiplies them by sqrt(n_embd).
    embd_std = d.n_embd**-0.5 if fam.post_norm else 1.0
    yield Tensor("token_embd.weight", (d.n_vocab, d.n_embd), embd_std)
    if fam.gpt:
        yield Tensor("position_embd.weight", (d.n_ctx, d.n_embd), embd_std, f32=True)
    for i in range(d.n_layer):
        if fam.recurrent:
            yield from _mamba(f"blk.{i}.", d)
            continue
        if fam.has_attention(i):
            yield from _attention(f"blk.{i}.", fam, d)
        else:
            yield from _short_convolution(f"blk.{i}.", d)
        yield from _ffn(f"blk.{i}.", fam, d)
        if fam.streams:
            yield from _stream_block(f"blk.{i}.", d)
    if fam.streams:
        yield from _stream_model(d)
    if fam.tied:
        # For logits of size 1. A mean above zero would make a tied model repeat its input.
        norm_std = d.n_embd**-0.5 / embd_std
        norm = "token_embd_norm" if fam.hybrid else "output_norm"  # LFM2's own name for it
        yield Tensor(f"{norm}.weight", (d.n_embd,), norm_std, f32=True)
        if fam.gpt:
            yield Tensor("output_norm.bias", (d.n_embd,), 0.2 * norm_std, f32=True)
    else:
        yield _norm("output_norm", d.n_embd)
        yield _matrix("output", d.n_vocab, d.n_embd)


def _numpy_type(t: Tensor, dtype: str) -> type[np.float16 | np.float32]:
    return np.float16 if dtype == "F16" and not t.f32 else np.float32


def _values(t: Tensor, dtype: str, seed: int, head: str) -> Array:
    """Draw the values of a tensor from its name and the seed, independently of other tensors.

    ``head`` names the output matrix. Its rows for control tokens are small, so that their logits
    are never the largest and a random model does not end its text by accident.
    """
    rng = np.random.default_rng([seed, zlib.crc32(t.name.encode())])
    size = int(np.prod(t.shape))
    block = rng.standard_normal(min(size, _BLOCK), dtype=np.float32)
    block = block * np.float32(t.std) + np.float32(t.mean)
    out: Array = np.resize(block.astype(_numpy_type(t, dtype)), t.shape)
    if t.name == head:
        out[: len(CONTROL)] *= 0.01
    return out


def _metadata(w: GGUFWriter, fam: Family, d: Dims, dtype: str) -> None:
    """Write the model's hyperparameters."""
    w.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == "F16" else LlamaFileType.ALL_F32)
    w.add_context_length(d.n_ctx)
    w.add_embedding_length(d.n_embd)
    w.add_block_count(d.n_layer)
    w.add_vocab_size(d.n_vocab)
    w.add_feed_forward_length(0 if fam.recurrent else d.n_ff)
    w.add_head_count(0 if fam.recurrent else d.n_head)
    if fam.gpt:
        w.add_layer_norm_eps(1e-5)
    else:
        w.add_layer_norm_rms_eps(1e-5)
    if fam.recurrent:
        w.add_ssm_conv_kernel(_SSM_CONV)
        w.add_ssm_inner_size(2 * d.n_embd)
        w.add_ssm_state_size(_SSM_STATE)
        w.add_ssm_time_step_rank(d.n_embd // 16)
    else:
        if fam.hybrid:  # the zeros tell which blocks have no attention
            w.add_head_count_kv([d.n_kv * fam.has_attention(i) for i in range(d.n_layer)])
            w.add_shortconv_l_cache(_SHORT_CONV)
        else:
            w.add_head_count_kv(d.n_kv)
        w.add_key_length(d.head_dim)
        w.add_value_length(d.head_dim)
    if fam.rope_base is not None:
        w.add_rope_freq_base(fam.rope_base)
        w.add_rope_dimension_count(d.head_dim)
    if fam.window is not None:
        w.add_sliding_window(fam.window)
    if fam.softcap:
        w.add_attn_logit_softcapping(50.0)
        w.add_final_logit_softcapping(30.0)


def _write(
    path: Path, arch: str, d: Dims, dtype: str, seed: int, vocabulary: Vocabulary, template: str
) -> Path:
    """Write the file, holding one tensor at a time in memory."""
    if dtype not in ("F32", "F16"):
        raise ValueError(f"dtype must be F32 or F16, not {dtype!r}")
    fam = _TABLE[arch]
    path.parent.mkdir(parents=True, exist_ok=True)
    w = GGUFWriter(path, arch)
    w.add_name("random weights")  # transformers needs a name; llama.cpp reacts to "phi3" in it
    _metadata(w, fam, d, dtype)
    vocabulary.write(w)
    if template:
        w.add_chat_template(template)
    tensors = list(_tensors(fam, d))
    for t in tensors:
        kind = np.dtype(_numpy_type(t, dtype))
        w.add_tensor_info(t.name, t.shape, kind, int(np.prod(t.shape)) * kind.itemsize)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    head = "token_embd.weight" if fam.tied else "output.weight"
    for t in tensors:
        w.write_tensor_data(_values(t, dtype, seed, head))
    w.close()
    return path


def write_tiny(
    family: str,
    path: Path,
    *,
    n_layer: int = 4,
    n_embd: int = 64,
    n_vocab: int = 320,
    dtype: str = "F32",
    seed: int = 0,
    chat_template: str = CHAT_TEMPLATE,
    control: list[str] | None = None,
    vocabulary_of: Path | None = None,
) -> Path:
    """Write a tiny model of one of ``FAMILIES``, with 4 heads and a context of 1024 tokens.

    ``n_embd`` must be a multiple of 32 (which Q8_0 needs), and of 256 for K-quants.

    ``chat_template`` is Jinja; "" leaves it out. ``control`` adds control tokens at the end of the
    vocabulary. ``vocabulary_of`` is a GGUF model to copy the byte-level vocabulary of; ``n_vocab``
    is then ignored.
    """
    if family not in _TABLE:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    if n_layer < 1 or n_embd < 32 or n_embd % 32:
        raise ValueError(
            f"expected n_layer >= 1 and n_embd a multiple of 32, found {n_layer} and {n_embd}"
        )
    fam = _TABLE[family]
    if vocabulary_of is None:
        vocabulary = synthetic_vocabulary(n_vocab, control or [])
    else:
        vocabulary = copied_vocabulary(vocabulary_of, control or [])
    dims = Dims(
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=(4 if fam.ffn == "plain" else 2) * n_embd,
        n_head=4,
        n_kv=2 if fam.grouped else 4,
        head_dim=fam.head_dim or n_embd // 4,
        n_vocab=len(vocabulary.texts),
        n_ctx=1024,
    )
    return _write(path, family, dims, dtype, seed, vocabulary, chat_template)


def write_bench(path: Path, *, shape: str = "1.1b", seed: int = 0) -> Path:
    """Write an F16 Llama for timing; ``shape`` is a key of ``BENCH_SHAPES``.

    The model has 32000 tokens and a context of 4096. "1.1b" takes 1.7 GB on disk, "small" 0.25 GB.
    """
    if shape not in BENCH_SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(BENCH_SHAPES)}")
    n_layer, n_embd, n_ff, n_head, n_kv = BENCH_SHAPES[shape]
    dims = Dims(n_layer, n_embd, n_ff, n_head, n_kv, n_embd // n_head, 32_000, 4096)
    vocabulary = synthetic_vocabulary(dims.n_vocab, [])
    return _write(path, "llama", dims, "F16", seed, vocabulary, CHAT_TEMPLATE)


app = typer.Typer(add_completion=False, help="Write random-weight GGUF models.")


app.command("tiny")(write_tiny)


@app.command()
def bench(out: Path, shape: str = "1.1b", ftype: str = "F16", seed: int = 0) -> None:
    """Write a Llama-shaped model for timing, then quantize it unless --ftype is F16."""
    if ftype not in FTYPES:
        raise typer.BadParameter(f"ftype must be one of {', '.join(FTYPES)}")
    if ftype == "F16":
        typer.echo(write_bench(out, shape=shape, seed=seed))
        return
    plain = out.with_name(out.name + ".f16")
    try:
        typer.echo(quantize(write_bench(plain, shape=shape, seed=seed), out, ftype))
    finally:
        plain.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
