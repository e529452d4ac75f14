"""Write small random-weight GGUF models for tests and benchmarks: no download, no vocabulary file.

The models have the real structure of their family (grouped-query attention, biases, post-norms,
sliding windows, fused projections), so a test that passes on them has met every tensor the family
has. Norm weights and biases are random too: leaving one out changes the logits.

For each family in ``TRANSFORMERS_FAMILIES`` an F32 file gives the same logits in llama.cpp (CPU,
F32 KV cache) and in transformers (``from_pretrained(folder, gguf_file=name)``). Logits of size 1
differ by 1e-5 in llama, qwen2, qwen3, phi3, mamba and lfm2, and by 2e-3 in gemma2, gemma3 and gpt2,
whose GELU llama.cpp's CPU backend reads from a table in half precision.

The vocabulary is sentencepiece-shaped and synthetic: control tokens, 256 byte tokens, "▁" and
short lower-case pieces. Any UTF-8 text goes through it unchanged, except a literal U+2581, which
sentencepiece itself turns into a space.

usage: python tools/tiny_models.py tiny llama out.gguf --n-embd 64 --dtype F32
       python tools/tiny_models.py bench out.gguf --shape 1.1b --ftype Q4_K_M
"""

from __future__ import annotations

import itertools
import string
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import typer
from gguf import GGUFReader, GGUFWriter, LlamaFileType, TokenType
from quantized import FTYPES, quantize

Array = npt.NDArray[np.float16 | np.float32]


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart from a Llama. The defaults are Llama's own."""

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
    hybrid: bool = False  # a short convolution for attention, but in every third block

    def has_attention(self, layer: int) -> bool:
        """Whether a block has one; a convolution in its place is followed by an FFN, too."""
        return not self.recurrent and (not self.hybrid or layer % 3 == 2)


# Transformers 5.23 does not read these from the file but takes the real models' values, so they
# are what the table and _metadata have: Qwen 3's head_dim, Gemma's attention scale 1/sqrt(256),
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
    "phi3": Family(fused_qkv=True, ffn="fused"),
    "gpt2": Family(rope_base=None, grouped=False, tied=True, gpt=True, fused_qkv=True, ffn="plain"),
    "mamba": Family(rope_base=None, tied=True, recurrent=True),
    "lfm2": Family(rope_base=1e6, tied=True, qk_norm=True, hybrid=True),
}
FAMILIES: tuple[str, ...] = tuple(_TABLE)
TRANSFORMERS_FAMILIES: tuple[str, ...] = FAMILIES

# name: n_layer, n_embd, n_ff, n_head, n_kv
BENCH_SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "1.1b": (16, 2048, 5632, 32, 8),
    "small": (12, 768, 2048, 12, 4),
}

_SSM_CONV, _SSM_STATE = 4, 16  # Mamba's own kernel width and state size
_SHORT_CONV = 3  # LFM2's own kernel width
_CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_COMMON = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st the and ing "
    "▁t ▁a ▁th ▁the ▁s ▁w ▁o ▁of ▁to ▁in ▁is"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MIN_VOCAB = len(_CONTROL) + 256 + 1  # without "▁" a space would not survive

# Larger tensors repeat this many random values. It is prime, so that rows do not line up with the
# repeats; at 1.1B it makes the file a matter of disk speed.
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
    """Give a projection whose output has about ``gain`` times its input's standard deviation."""
    return Tensor(f"{name}.weight", (rows, cols), gain / cols**0.5)


def _norm(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.weight", (size,), 0.2, 1.0, f32=True)


def _bias(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.bias", (size,), 0.2, f32=True)


def _attention(p: str, fam: Family, d: Dims) -> Iterator[Tensor]:
    """Attention tensors of one block; ``p`` is the name's prefix, "blk.N."."""
    q, kv = d.n_head * d.head_dim, d.n_kv * d.head_dim
    yield _norm(p + "attn_norm", d.n_embd)
    # Scores of size 2 or so: from random weights, smaller ones leave attention almost uniform.
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
    """What LFM2's other blocks have for attention."""
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
    """Draw the tensor's values, which depend on its name and on the seed but not on other tensors.

    ``head`` names the output matrix; its control-token rows are made small, so that their logits
    are never the largest and a random model does not end its text by accident.
    """
    rng = np.random.default_rng([seed, zlib.crc32(t.name.encode())])
    size = int(np.prod(t.shape))
    block = rng.standard_normal(min(size, _BLOCK), dtype=np.float32)
    block = block * np.float32(t.std) + np.float32(t.mean)
    out: Array = np.resize(block.astype(_numpy_type(t, dtype)), t.shape)
    if t.name == head:
        out[: len(_CONTROL)] *= 0.01
    return out


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a model: token texts and types, and how texts are split into tokens."""

    texts: list[bytes]
    types: list[int]
    scores: list[float] | None = None  # sentencepiece: higher merges first
    merges: list[str] | None = None  # byte-level BPE
    pre: str = "default"  # llama.cpp's name for the pattern that splits a text into words

    def write(self, w: GGUFWriter) -> None:
        """Write the tokenizer's metadata. BOS is token 1, EOS token 2."""
        w.add_tokenizer_model("llama" if self.merges is None else "gpt2")
        w.add_tokenizer_pre(self.pre)
        w.add_token_list(self.texts)
        w.add_token_types(self.types)
        if self.scores is not None:
            w.add_token_scores(self.scores)
        if self.merges is not None:
            w.add_token_merges(self.merges)
        w.add_unk_token_id(0)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_pad_token_id(0)  # transformers' Phi-3 would otherwise pad with token 32000
        w.add_add_bos_token(self.merges is None)
        w.add_add_space_prefix(False)  # a prefix would not survive the round trip


def _synthetic_vocabulary(n_vocab: int, control: Sequence[str]) -> Vocabulary:
    """Make a sentencepiece vocabulary that ends in the control tokens given."""
    least = _MIN_VOCAB + len(control)
    if n_vocab < least:
        raise ValueError(f"n_vocab must be at least {least}, not {n_vocab}")
    letters = string.ascii_lowercase
    runs = (
        start + "".join(run)
        for length in itertools.count(1)
        for start in ("", "▁")
        for run in itertools.product(letters, repeat=length)
    )
    # A piece is only reached by joining shorter ones, so the letters come first.
    normal: dict[str, None] = {}  # as an ordered set
    for piece in itertools.chain("▁" + letters, _COMMON.split(), runs):
        if len(normal) == n_vocab - least + 1:
            break
        normal[piece] = None
    texts = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *normal, *control]
    types = [TokenType.UNKNOWN] + [TokenType.CONTROL] * (len(_CONTROL) - 1)
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(normal)
    types += [TokenType.CONTROL] * len(control)
    scores = [0.0] * (len(_CONTROL) + 256) + [-float(i) for i in range(len(normal))]
    scores += [0.0] * len(control)
    return Vocabulary([text.encode() for text in texts], [int(kind) for kind in types], scores)


@cache
def _vocabulary_of(path: Path) -> Vocabulary:
    fields = GGUFReader(path).fields

    def contents(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    texts = [text.encode() for text in contents("tokens")]
    return Vocabulary(texts, contents("token_type"), merges=contents("merges"), pre=contents("pre"))


def _copied_vocabulary(path: Path, control: Sequence[str]) -> Vocabulary:
    """Read the byte-level vocabulary of a model, and add control tokens at its end."""
    found = _vocabulary_of(path)
    added = [text.encode() for text in control]
    types = [*found.types, *[int(TokenType.CONTROL)] * len(added)]
    return replace(found, texts=[*found.texts, *added], types=types)


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
        if fam.hybrid:  # which also says which blocks have attention
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
    """Write a tiny model of one of ``FAMILIES``, 4 heads wide, with a context of 1024 tokens.

    ``n_embd`` must be a multiple of 32 (which Q8_0 needs), and of 256 for K-quants.

    ``chat_template`` is Jinja; "" leaves it out. ``control`` are more control tokens, at the end of
    the vocabulary. ``vocabulary_of`` is a GGUF model whose byte-level vocabulary is copied;
    ``n_vocab`` then counts for nothing.
    """
    if family not in _TABLE:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    if n_layer < 1 or n_embd < 32 or n_embd % 32:
        raise ValueError(f"n_layer {n_layer} must be >= 1, n_embd {n_embd} a multiple of 32")
    fam = _TABLE[family]
    if vocabulary_of is None:
        vocabulary = _synthetic_vocabulary(n_vocab, control or [])
    else:
        vocabulary = _copied_vocabulary(vocabulary_of, control or [])
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
    """Write an F16 Llama of a benchmark's shape, a key of ``BENCH_SHAPES``: for timing only.

    It has 32000 tokens and a context of 4096. "1.1b" takes 1.7 GB on disk, "small" 0.25 GB.
    """
    if shape not in BENCH_SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(BENCH_SHAPES)}")
    n_layer, n_embd, n_ff, n_head, n_kv = BENCH_SHAPES[shape]
    dims = Dims(n_layer, n_embd, n_ff, n_head, n_kv, n_embd // n_head, 32_000, 4096)
    vocabulary = _synthetic_vocabulary(dims.n_vocab, [])
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
