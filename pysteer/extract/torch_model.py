"""Causal language models of transformers: loading, blocks, tokens, answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pysteer.errors import SteeringError
from pysteer.extract.capture import Tokens, continuation, file_identity, token_batches
from pysteer.formats.container import read_metadata
from pysteer.pack.pack import BaseModel

_log = logging.getLogger(__name__)

# transformers' model_type to GGUF's general.architecture, where they differ.
_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "ministral": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)


class TorchModel:
    """A causal language model, its tokenizer and its sites.

    No architecture is listed by name: the blocks are the module list with as many modules as the
    configuration has layers, and a block's attention and feed-forward parts are its children with
    such names.

    Args:
        source: a hub id, a local folder, or a `.gguf` file (which transformers de-quantises).
        dtype: of weights and activations; None is the processor's fastest: bfloat16 if it
            has instructions for bfloat16, else float32.
        device_map: as `from_pretrained` takes it; None is the CPU.

    Raises:
        SteeringError: the model cannot be loaded, or its blocks are not found.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> None:
        where: dict[str, Any] = {}
        unpacked: dict[str, Any] = {}
        name = str(source)
        path = Path(source)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise SteeringError(f"{source}: no such file")
            name, where["gguf_file"] = str(path.parent), path.name
            if hasattr(transformers, "GgufConfig"):
                # Newer versions would keep the weights quantised and compute in float32.
                unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
        self.dtype = dtype if dtype is not None else fastest_dtype()
        self.weights = f"{path.name}, {str(self.dtype).removeprefix('torch.')}"
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **where)
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=self.dtype, device_map=device_map, **where, **unpacked
            )
        except Exception as error:  # of many kinds, from several packages
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise SteeringError(f"{source}: transformers cannot load it: {reason[0]}") from None
        self.model.requires_grad_(False)
        self.model.eval()
        config = self.model.config.get_text_config()
        self.n_layer = int(config.num_hidden_layers)
        self.n_embd = int(config.hidden_size)
        self.n_ctx = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        self.blocks = find_blocks(self.model, self.n_layer)
        self.base_model = _base_model(path if where else None, config, self.n_layer, self.n_embd)
        self.identity = f"{_files(path) or _revision(source, self.model.config)} {self.dtype}"
        self.device: Any = self.model.get_input_embeddings().weight.device
        if not self.has_chat_template:
            _log.warning("%s has no chat template; prompts are taken as they are", source)

    @property
    def has_chat_template(self) -> bool:
        """True if prompts are put into a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site to the layers that have it, ascending."""
        found: dict[str, tuple[int, ...]] = {"residual": tuple(range(self.n_layer))}
        for site in ("attention", "mlp"):
            found[site] = tuple(
                layer for layer, block in enumerate(self.blocks) if _child(block, site) is not None
            )
        return found

    def module(self, site: str, layer: int) -> nn.Module:
        """Return the module whose output is a site.

        Raises:
            SteeringError: the model has no such site there.
        """
        block = self.blocks[layer]
        found = block if site == "residual" else _child(block, site)
        if found is None:
            raise SteeringError(f"no site {site!r} was found in layer {layer} of this model")
        return found

    def prompt_tokens(self, prompt: str) -> Tokens:
        """Return a user's message in the chat template, up to where the response starts."""
        if not self.has_chat_template:
            return tuple(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response_tokens(self, text: str) -> Tokens:
        """Return the tokens of text that continues a prompt."""

        def encode(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            return ids

        return continuation(encode, text)

    def text(self, tokens: Tokens) -> str:
        """Return the text of a response."""
        return str(self.tokenizer.decode(list(tokens)))

    @cached_property
    def end_of_turn(self) -> Tokens:
        """The token that ends an answer: the chat template's, else the end of text.

        () if the model has neither, which is logged.
        """
        tail = ""
        if self.has_chat_template:
            turns = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "pysteer"},
            ]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            tail = text.rpartition("pysteer")[2]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in special:
                return (int(token),)
        if self.tokenizer.eos_token_id is not None:
            return (int(self.tokenizer.eos_token_id),)
        _log.warning(
            "the model has no token that ends an answer; safe answers are learned without an end"
        )
        return ()

    def padded(self, sequences: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, padded on the right.

        So every token has the position that it has alone, and sees the same tokens, because
        attention is causal: padding cannot change the states of a row.
        """
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(sequences):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def answers(self, prompts: Sequence[Tokens], n_tokens: int) -> Iterator[tuple[int, Tokens]]:
        """Yield the model's own greedy answers; see `Capture.answers`."""
        ends = {self.tokenizer.eos_token_id, *_listed(self.model.generation_config.eos_token_id)}
        for batch in token_batches(list(map(len, prompts)), 2048, 32, padded=True):
            inputs = self.padded([prompts[i] for i in batch])
            # generate() continues the last column, so the padding has to be on the left.
            for row in range(len(batch)):
                shift = int((inputs["attention_mask"][row] == 0).sum())
                for name in ("input_ids", "attention_mask"):
                    inputs[name][row] = inputs[name][row].roll(shift)
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs,
                    max_new_tokens=n_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.eos_token_id or 0,
                )
            for index, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :], strict=True):
                answer = ids.tolist()
                stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
                yield index, tuple(answer[:stop])


def fastest_dtype() -> torch.dtype:
    """Return bfloat16 if the processor has instructions for it, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if torch.backends.mps.is_available():
        return torch.float16
    # Without the instructions bfloat16 is emulated, slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def find_blocks(model: nn.Module, n_layer: int) -> nn.ModuleList:
    """Return the model's blocks: the module list of that length with the largest modules.

    Raises:
        SteeringError: there is no such list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layer]
    if not lists:
        raise SteeringError(f"no list of {n_layer} blocks was found in {type(model).__name__}")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def _child(block: nn.Module, site: str) -> nn.Module | None:
    pattern = _ATTENTION if site == "attention" else _MLP
    found = [
        child
        for name, child in block.named_children()
        if pattern.search(name) and not _NORM.search(name) and any(True for _ in child.parameters())
    ]
    return found[0] if len(found) == 1 else None


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _files(path: Path) -> str:
    """Return the identity of a local model's files; "" for other models."""
    if path.is_dir():
        return " ".join(file_identity(file) for file in sorted(path.iterdir()) if file.is_file())
    return file_identity(path) if path.is_file() else ""


def _revision(hub_id: str, config: Any) -> str:
    return f"{hub_id} {getattr(config, '_commit_hash', None)}"


def _base_model(gguf_file: Path | None, config: Any, n_layer: int, n_embd: int) -> BaseModel:
    """Return the base model with GGUF's names: from the file, or from its conversion."""
    if gguf_file is not None:
        metadata = read_metadata(gguf_file)
        architecture = str(metadata["general.architecture"])
        tokens = metadata["tokenizer.ggml.tokens"]
        n_vocab = len(tokens) if isinstance(tokens, list) else 0
        return BaseModel(
            architecture, str(metadata.get("general.name", "")), n_layer, n_embd, n_vocab
        )
    kind = str(config.model_type)
    name = str(getattr(config, "_name_or_path", "")).rstrip("/").split("/")[-1]
    return BaseModel(_ARCHITECTURES.get(kind, kind), name, n_layer, n_embd, int(config.vocab_size))
