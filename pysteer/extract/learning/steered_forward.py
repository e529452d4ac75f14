"""Fast forward passes with directions added, for gradient descent on the directions.

Four savings, independent of the model's family:

- Nothing below the first steered block depends on the directions. So the output of that block is
  computed once per sequence and kept; a steered pass takes the kept output in place of that block
  and of all blocks below.
- The start that all sequences of a batch share, the system message of many chat templates, runs
  once; the rest of each sequence reads its keys and values.
- The output head, the largest matrix of many models, runs at the wanted positions only. Changes of
  the model to its logits (a soft cap, a scale) still happen.
- Sequences are padded on the right and run without an attention mask. Attention is causal, so no
  token sees the padding behind it.

The first two change the inputs of the model's own code. A trial run compares the final states, and
the savings are turned off, with a log message, for models where they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from pysteer.chat.spans import shared_start
from pysteer.errors import SteeringError
from pysteer.extract.capture import Tokens, token_batches
from pysteer.extract.passes import MIN_SHARED, TOLERANCE, Done, states_of
from pysteer.extract.torch_model import TorchModel

_log = logging.getLogger(__name__)

_MAX_ROWS = 64
_TYPICAL_SEQUENCES = 32


@dataclass(frozen=True)
class Span:
    """A sequence, and the range [start, stop) of positions whose predictions count."""

    tokens: Tokens
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prepared:
    """A span, and the unsteered model's states for it.

    Attributes:
        span: the span.
        hidden: output of the last block that the directions do not reach, shape
            (len(span.tokens), n_embd); None if they reach all blocks.
        final: input of the output head at the span's positions, shape (len(span), n_embd); None
            if it was not wanted.
    """

    span: Span
    hidden: Tensor | None
    final: Tensor | None


class SteeredForward:
    """A model that runs with directions added at a site of some layers, at every token.

    The directions are added to the outputs of `model.module(site, layer)`, as `SteeringVector`
    means them. Each method restores the model before it returns or raises.

    Args:
        model: the model.
        layers: the steered layers.
        site: residual, attention or mlp.
        token_budget: tokens per batch of `prepare`, padding included.

    Raises:
        SteeringError: no layers, or the model has no such site there.
    """

    def __init__(
        self,
        model: TorchModel,
        layers: Sequence[int],
        *,
        site: str = "residual",
        token_budget: int = 1024,
    ) -> None:
        self.model = model
        self.site = site
        self.layers = tuple(sorted(set(layers)))
        self.token_budget = token_budget
        known = model.sites.get(site, ())
        if not self.layers or not set(self.layers) <= set(known):
            raise SteeringError(
                f"cannot learn directions for site {site!r} of layers {list(self.layers)}; "
                f"this model has that site in layers {list(known)}"
            )
        self._modules = [model.module(site, layer) for layer in self.layers]
        head = model.model.get_output_embeddings()
        if head is None:
            raise SteeringError(f"no output head was found in {type(model.model).__name__}")
        self._head: nn.Module = head
        # At the residual site the block's output is replaced, then the direction is added. A
        # direction inside the block needs the block to run.
        self._n_skipped = self.layers[0] + (1 if site == "residual" else 0)
        self._others_returned: int | None = None
        self._shares = True
        if not self._works():
            self._shares = False
            name = type(model.model).__name__
            _log.info("%s cannot run a shared start once for all sequences", name)
            if self._n_skipped and not self._works():
                self._n_skipped = 0
                _log.warning("%s cannot run its upper blocks alone; learning is slower", name)

    def prepare(
        self, spans: Sequence[Span], *, final: bool, before_each: Callable[[], None] | None = None
    ) -> list[Prepared]:
        """Run sequences without steering, and return the states that `logits` needs, in order.

        Args:
            spans: the sequences.
            final: True: keep the head's input, from which `logits` computes the unsteered logits.
                False: the blocks above the first steered block do not run.
            before_each: called before each batch; may raise.
        """
        prepared: list[Prepared | None] = [None] * len(spans)
        lengths = [len(span.tokens) for span in spans]
        for batch in token_batches(lengths, self.token_budget, _MAX_ROWS, padded=True):
            if before_each is not None:
                before_each()
            chosen = [spans[i] for i in batch]
            for i, one in zip(batch, self._prepare(chosen, final), strict=True):
                prepared[i] = one
        return [one for one in prepared if one is not None]

    def logits(self, batch: Sequence[Prepared], directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits with directions added, and without.

        Args:
            batch: sequences from `prepare`.
            directions: shape (len(layers), n_embd), float32, in the order of `layers`. Sums are
                formed in float32 and rounded to the model's type.

        Returns:
            Steered logits of all spans, concatenated, shape (sum of their lengths, n_vocab), and
            unsteered logits of the spans prepared with `final`, in the same order. Both in the
            model's type; the steered logits carry gradients to `directions`.
        """
        finals = [one.final for one in batch if one.final is not None]

        def gather(states: Tensor, spans: Sequence[Span]) -> Tensor:
            return torch.cat([_rows(states, spans), *finals])

        with ExitStack() as stack:
            for module, direction in zip(self._modules, directions, strict=True):
                stack.enter_context(module.register_forward_hook(partial(_add, direction)))
            logits = self._upper(batch, gather)
        n_steered = sum(len(one.span) for one in batch)
        return logits[:n_steered], logits[n_steered:].detach()

    def typical_sizes(self, sequences: Sequence[Tokens]) -> dict[int, float]:
        """Return layer to the typical size of one component of the residual stream after the block.

        The median absolute value over the components and tokens of up to 32 of the sequences,
        evenly spread. Not the mean: a few components, and the first token, are far larger than all
        others.
        """
        found: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

        def keep(layer: int, _module: Any, _inputs: Any, output: Any) -> None:
            found[layer].append(states_of(output)[0].float().abs().flatten())
            if layer == self.layers[-1]:
                raise Done

        with ExitStack() as stack:
            for layer in self.layers:
                block = self.model.blocks[layer]
                stack.enter_context(block.register_forward_hook(partial(keep, layer)))
            for tokens in sequences[:: -(-len(sequences) // _TYPICAL_SEQUENCES)]:
                self._run_until_done([tokens])
        return {layer: float(torch.cat(parts).median()) for layer, parts in found.items()}

    def _run(self, sequences: Sequence[Tokens], past: Any = None) -> Any:
        ids = self.model.padded(sequences)["input_ids"]
        if past is None:
            return self.model.model(input_ids=ids, use_cache=False)
        return self.model.model(input_ids=ids, past_key_values=past, use_cache=True)

    def _run_until_done(self, sequences: Sequence[Tokens]) -> None:
        try:
            with torch.no_grad():
                self._run(sequences)
        except Done:
            pass

    def _prepare(self, spans: Sequence[Span], final: bool) -> list[Prepared]:
        hidden: list[Tensor] = []
        finals: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            hidden.append(states_of(output))
            self._others_returned = len(output) - 1 if isinstance(output, tuple) else None
            if not final:
                raise Done

        def keep_final(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = _rows(inputs[0], spans)
            finals.extend(part.clone() for part in rows.split([len(span) for span in spans]))
            return (rows[:0][None], *inputs[1:])  # no rows: the logits are not wanted

        if self._n_skipped or final:
            with ExitStack() as stack:
                if self._n_skipped:
                    last = self.model.blocks[self._n_skipped - 1]
                    stack.enter_context(last.register_forward_hook(keep))
                stack.enter_context(self._head.register_forward_pre_hook(keep_final))
                self._run_until_done([span.tokens for span in spans])
        return [
            Prepared(
                span,
                hidden[0][i, : len(span.tokens)].clone() if hidden else None,
                finals[i] if finals else None,
            )
            for i, span in enumerate(spans)
        ]

    def _upper(
        self, batch: Sequence[Prepared], at_head: Callable[[Tensor, Sequence[Span]], Tensor]
    ) -> Tensor:
        """Run the blocks above the kept states.

        Args:
            batch: sequences from `prepare`.
            at_head: from final states, shape (len(batch), tokens, n_embd), and the spans in them,
                to the head's input, shape (rows, n_embd).

        Returns:
            Logits of these rows, shape (rows, n_vocab).
        """
        shared = self._shared_length([one.span for one in batch])
        spans = [
            Span(s.tokens[shared:], s.start - shared, s.stop - shared)
            for s in (one.span for one in batch)
        ]

        def gather(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (at_head(inputs[0], spans)[None], *inputs[1:])

        with ExitStack() as stack:
            if self.model.device.type == "cpu":
                # On a CPU the fused kernel's backward pass takes several times as long.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            past = self._run_shared(batch, shared) if shared else None
            if self._n_skipped:
                kept = [_kept(one)[shared:] for one in batch]
                stack.enter_context(self._skipping(pad_sequence(kept, batch_first=True)))
            stack.enter_context(self._head.register_forward_pre_hook(gather))
            logits: Tensor = self._run([span.tokens for span in spans], past).logits[0]
        return logits

    def _shared_length(self, spans: Sequence[Span]) -> int:
        """Return the length of the shared start, in which no predictions are wanted."""
        if not self._shares or len(spans) < 2:
            return 0
        length = shared_start([span.tokens[: span.start] for span in spans])
        return length if length >= MIN_SHARED else 0

    def _run_shared(self, batch: Sequence[Prepared], length: int) -> Any:
        """Return keys and values of the batch's first `length` tokens, for each row."""

        def gather(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0][:, :0], *inputs[1:])  # the logits are not wanted

        with ExitStack() as stack:
            if self._n_skipped:
                stack.enter_context(self._skipping(_kept(batch[0])[None, :length]))
            stack.enter_context(self._head.register_forward_pre_hook(gather))
            ids = self.model.padded([batch[0].span.tokens[:length]])["input_ids"]
            past = self.model.model(input_ids=ids, use_cache=True).past_key_values
        # transformers counts positions in the lowest layers' cache.
        for layer in range(self._n_skipped):
            placeholder = torch.zeros(1, 1, length, 1, dtype=self.model.dtype, device=ids.device)
            past.update(placeholder, placeholder, layer)
        past.batch_repeat_interleave(len(batch))
        return past

    @contextmanager
    def _skipping(self, hidden: Tensor) -> Iterator[None]:
        """Make the blocks that no direction reaches return `hidden`."""
        others = self._others_returned
        output = hidden if others is None else (hidden, *[None] * others)

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return output

        with ExitStack() as stack:
            for block in self.model.blocks[: self._n_skipped]:
                stack.enter_context(_replaced_forward(block, forward))
            yield

    def _works(self) -> bool:
        """Return True if `_upper` gives the final states of the plain model."""
        start = tuple(range(1, 2 * MIN_SHARED))
        spans = [
            Span(start + end, MIN_SHARED, len(start + end)) for end in ((3, 1, 2), (5, 6, 7, 8, 9))
        ]
        found: list[Tensor] = []

        def keep(states: Tensor, spans: Sequence[Span]) -> Tensor:
            found.append(_rows(states, spans))
            return found[0]

        try:
            prepared = self.prepare(spans, final=True)
            with torch.no_grad():
                self._upper(prepared, keep)
        except Exception as error:  # models that miss an input fail in many ways
            _log.info("a forward pass in parts failed: %r", error)
            return False
        wanted = torch.cat([one.final for one in prepared if one.final is not None]).float()
        apart = (found[0].float() - wanted).norm() / wanted.norm()
        return bool(apart < TOLERANCE)


@contextmanager
def _replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # accelerate, which spreads a model over devices, may have replaced the method already.
    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _add(direction: Tensor, _module: Any, _inputs: Any, output: Any) -> Any:
    states = states_of(output)
    steered = (states + direction.to(states.device)).to(states.dtype)
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def _kept(one: Prepared) -> Tensor:
    if one.hidden is None:
        raise SteeringError("the sequence was prepared for other layers")
    return one.hidden


def _rows(states: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return the spans' rows of states of shape (spans, tokens, n_embd), concatenated."""
    # Slices: the gradient of an index adds up in an order that is not fixed on every device.
    return torch.cat([states[i, span.start : span.stop] for i, span in enumerate(spans)])
