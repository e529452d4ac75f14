"""`HookedContext`: a llama_context with the native hook installed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import llama_cpp
import numpy as np
import numpy.typing as npt

from pysteer import _native
from pysteer.errors import HookError, SteeringError
from pysteer.llama.batch import EVERY_ROW, LAST_ROW, NO_ROW, DecodeBatch, Run, chunked
from pysteer.llama.capture import (
    Activations,
    CaptureRequest,
    Pooling,
    pooled_capture,
    spans_capture,
    wanted_layers,
)
from pysteer.llama.control_vector import set_control_vector
from pysteer.llama.forks import left_behind
from pysteer.llama.log import kept_errors, with_cause
from pysteer.llama.memory import ContextMemory
from pysteer.pack.vector import SITES

_NO_ROOM = 1  # status of llama_decode: no cells for this batch; nothing was changed


class SpoiledDecodeError(HookError):
    """A decode ended, and its results are wrong: the owner of the context has to drop them."""


class CacheFullError(HookError):
    """The context has no cells for the batch; nothing was decoded."""


@contextmanager
def _hook_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise HookError(str(error)) from None


class HookedContext:
    """A llama_context whose layer outputs can be read and changed.

    Knows the model's sites, brackets every decode, steers by sequence and captures activations.
    Every decode in the context goes through `decode` or happens inside `decoding`.

    The hook has to exist before the llama_context: `install` puts it into the parameters, `attach`
    takes over the context made with them. One thread at a time may decode; `lock` is held
    meanwhile, and by `close`.

    Args:
        max_sequences: number of sequences that one decode may hold.

    Attributes:
        lock: held while the context decodes.
        pointer: the llama_context.
        memory: its KV cache or recurrent state.
        n_layer: number of blocks.
        n_embd: width of the hidden state.
        n_vocab: number of tokens in the vocabulary.
        n_ctx: number of tokens that fit the context.
        n_batch: number of tokens that fit a batch.
        is_recurrent: the model has a recurrent state instead of a KV cache.
        batches_sequences: one decode may hold tokens of several sequences. Not for recurrent and
            hybrid models: llama.cpp orders the rows of their batches by sequence.
    """

    pointer: llama_cpp.llama_context_p
    memory: ContextMemory
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_batch: int
    is_recurrent: bool
    batches_sequences: bool

    def __init__(self, max_sequences: int = 1) -> None:
        self.max_sequences = max_sequences
        self.lock = threading.RLock()
        self.n_layer = 0
        self._hook = _native.Hook()
        self._probed = False
        self._foreign = False
        self._closed = False
        self._left = False

    def install(self, params: llama_cpp.llama_context_params) -> None:
        """Put the hook, and room for the sequences, into the parameters of a new context."""
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(_native.callback_address)
        params.cb_eval_user_data = ctypes.c_void_p(self._hook.address)
        if self.max_sequences > 1:
            params.n_seq_max = self.max_sequences
            params.kv_unified = True  # rows then come in the order of the batch

    def attach(self, context: llama_cpp.llama_context_p, *, n_batch: int) -> None:
        """Take over a context that was created with the installed parameters."""
        self.pointer = context
        self.n_batch = n_batch
        model = llama_cpp.llama_get_model(context)
        self._model = model
        self.n_layer = int(llama_cpp.llama_model_n_layer(model))
        self.n_embd = int(llama_cpp.llama_model_n_embd(model))
        self.n_ctx = int(llama_cpp.llama_n_ctx(context))
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self.is_recurrent = bool(llama_cpp.llama_model_is_recurrent(model))
        self.batches_sequences = not (
            self.is_recurrent or bool(llama_cpp.llama_model_is_hybrid(model))
        )
        self.memory = ContextMemory(context)

    def close(self) -> None:
        """Release the context, which may be freed then. May be called again."""
        with self.lock:
            self._closed = True
            self._hook.detach()

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def leave(self) -> None:
        """Become the copy in a forked process, which must not touch the context."""
        self.lock = threading.RLock()
        self._left = True

    @property
    def left(self) -> bool:
        """True in the copy of a forked process."""
        return self._left

    def require_open(self) -> None:
        """Raise SteeringError if the context is closed, or belongs to another process."""
        if self._left:
            raise left_behind("the model")
        if self._closed:
            raise SteeringError("the model is closed; create a new one")

    # ---- sites -------------------------------------------------------------------------------

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site to the layers at which this model's graph has the site, ascending.

        Empty before `probe`, as for a vocabulary without weights.
        """
        found = self._hook.sites if self._probed else []
        return {
            site: tuple(sorted(one.layer for one in found if one.site.name == site))
            for site in SITES
        }

    @property
    def site_nodes(self) -> list[_native.SiteNode]:
        """The graph node of each site and layer, and the node's memory."""
        return self._hook.sites

    def probe(self) -> None:
        """Find the sites by one decode, and leave the context as it was before.

        Each control-vector tensor is filled with its layer's number, by which the native part
        recognises the layer. Afterwards the tensors stay in the graph and hold zeros.

        Raises:
            HookError: the model has an encoder, or no site.
        """
        if llama_cpp.llama_model_has_encoder(self._model):
            raise HookError("models with an encoder cannot be hooked; decoder-only models can")
        if self.n_layer > 1:
            layers = np.arange(1, self.n_layer, dtype=np.float32)
            set_control_vector(self.pointer, np.repeat(layers[:, None], self.n_embd, axis=1))
        self._hook.begin_probe(self.n_layer, self.n_embd, 1)
        batch = DecodeBatch(1)
        bos = llama_cpp.llama_vocab_bos(llama_cpp.llama_model_get_vocab(self._model))
        batch.add(0, 0, [max(bos, 0)])
        try:
            status = batch.decode(self.pointer)
        finally:
            self._hook.end_probe()
        if status != 0:
            raise HookError(f"the model could not be probed: llama_decode returned {status}")
        self._probed = True
        if self.n_layer > 1:  # also vectors of which the graph has only a copy on another device
            set_control_vector(self.pointer, np.zeros((self.n_layer - 1, self.n_embd), np.float32))
        self.memory.clear(data=True)
        llama_cpp.llama_perf_context_reset(self.pointer)
        if not self._hook.sites:
            raise HookError(
                f"architecture {self._architecture()!r} cannot be hooked: its graph has "
                "neither a control-vector node nor an attention output projection"
            )

    def _architecture(self) -> str:
        buffer = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_meta_val_str(self._model, b"general.architecture", buffer, 128)
        return buffer.value.decode("utf-8", errors="replace")

    # ---- decode ------------------------------------------------------------------------------

    def set_sequence(self, slot: int, sequence: _native.Sequence | None) -> None:
        """Steer the tokens of a sequence of llama.cpp's batches, from the next decode on.

        Args:
            slot: llama.cpp's sequence id.
            sequence: the steering; None ends it.

        Raises:
            HookError: the model lacks a site of the plan.
        """
        self.drop_foreign()
        with _hook_errors():
            self._hook.set_sequence(slot, sequence)

    @property
    def was_resident(self) -> bool:
        """True if the latest decode was steered through llama.cpp's control vector."""
        return self._hook.was_resident

    def next_decision(self, slot: int) -> int:
        """Return the position at which the router of a sequence decides next, or -1."""
        return self._hook.next_decision(slot)

    @contextmanager
    def decoding(self, runs: Sequence[Run]) -> Iterator[None]:
        """Bracket the decodes of one evaluation; afterwards, check that steering was complete.

        Args:
            runs: the rows to be decoded, in order.

        Raises:
            HookError: the runs cannot be steered by their plans; nothing was decoded.
            SpoiledDecodeError: a site that is to be steered was not reached by every token, or the
                hidden state is not finite.
        """
        with self.lock:
            self._begin(runs)
            try:
                yield
            except BaseException:
                self._hook.abandon_decode()
                raise
            self._end()

    def decode(self, batch: DecodeBatch) -> None:
        """Decode a batch.

        Raises:
            CacheFullError: the context has no room for the batch; nothing was decoded.
            HookError: llama.cpp failed, or as `decoding`.
        """
        with self.lock:
            self._begin(batch.runs)
            try:
                self._decode(batch)
            except BaseException:
                self._hook.abandon_decode()
                raise
            self._end()

    def begin_foreign(self, position: int, n_positions: int) -> None:
        """Steer what a caller of llama.cpp decodes next in sequence 0, such as an image.

        Ends with `end_foreign`, or without account at the next `decode`, `decoding` or capture.

        Args:
            position: of the first row, in a prompt.
            n_positions: the largest number of positions; rows beyond share the last position.

        Raises:
            HookError: the rows cannot be steered by the sequence's plan.
        """
        self.require_open()
        self.drop_foreign()
        with _hook_errors():
            self._hook.begin_foreign(0, position, self.n_ctx, n_positions)
        self._foreign = True

    def end_foreign(self) -> int | None:
        """End what `begin_foreign` began, and return the number of rows decoded.

        Returns:
            0 for models of one block, whose rows are not counted; None if nothing had begun.

        Raises:
            SpoiledDecodeError: as `decoding`.
        """
        if not self._foreign:
            return None
        self._foreign = False
        try:
            return self._hook.end_foreign()
        except RuntimeError as error:
            raise SpoiledDecodeError(str(error)) from None

    def drop_foreign(self) -> None:
        """End what `begin_foreign` began, if it began, without account."""
        if self._foreign:
            self._foreign = False
            self._hook.abandon_decode()

    def _begin(self, runs: Sequence[Run]) -> None:
        self.require_open()
        self.drop_foreign()
        with _hook_errors():
            self._hook.begin_decode(np.asarray(runs, np.int32).reshape(-1, 4))

    def _end(self) -> None:
        try:
            self._hook.end_decode()
        except RuntimeError as error:
            raise SpoiledDecodeError(str(error)) from None

    def _decode(self, batch: DecodeBatch) -> None:
        with kept_errors() as errors:
            status = batch.decode(self.pointer)
        if status == _NO_ROOM:
            raise CacheFullError("the context has no room for the batch; pass a larger n_ctx")
        if status != 0:
            message = f"llama.cpp could not decode a batch (status {status})"
            raise HookError(with_cause(message, errors))

    @property
    def cuts(self) -> int:
        """Number of nodes after which the last decode cut the graph, to change or read rows."""
        return self._hook.cuts

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Return a view of the logits of a row of the last batch, float32 (n_vocab,)."""
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(self.pointer, row), shape=(self.n_vocab,)
        )

    # ---- capture -----------------------------------------------------------------------------

    def capture(
        self,
        tokens: Sequence[int],
        *,
        sites: Iterable[str] = ("residual",),
        layers: Iterable[int] | None = None,
        pool: Pooling = "last",
        span: tuple[int, int] | None = None,
    ) -> Activations:
        """Return activations of a prompt, as the rest of the model sees them.

        Starts from an empty context and leaves an empty one. Pooling happens natively while the
        prompt is decoded, without the GIL; the model computes nothing after the last site wanted.

        Args:
            tokens: the prompt, at most n_ctx tokens.
            sites: of "residual", "attention" and "mlp".
            layers: block indices; None is every layer that has the site.
            pool: "last" token of the span, "mean" over the span (summed in float64), or "all" rows.
            span: token range [start, stop); None is the whole prompt.

        Returns:
            site to layer to float32 array, of shape (n_embd,) for "last" and "mean" and
            (stop - start, n_embd) for "all".

        Raises:
            SteeringError: an unknown site or pooling, a layer without the site, an empty or
                impossible span, too many tokens.
        """
        request = pooled_capture(tokens, wanted_layers(self.sites, sites, layers), pool, span)
        rows = self._capture(request)
        if pool == "all":
            return rows
        return {site: {i: row[0] for i, row in found.items()} for site, found in rows.items()}

    def capture_means(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        *,
        owners: Sequence[int] | None = None,
        sites: Iterable[str] = ("residual",),
        layers: Iterable[int] | None = None,
        shared: int = 0,
    ) -> Activations:
        """Return mean activations over spans of several sequences, decoded as one batch.

        Args:
            sequences: at most `max_sequences` token sequences, each from position 0; together at
                most n_batch tokens (a single sequence: n_ctx).
            spans: token ranges [start, stop), at least one for each sequence. Spans of one sequence
                must not overlap.
            owners: for each span, the number of its sequence; None: one span for each sequence,
                in order.
            shared: number of first tokens that all sequences share. These tokens are decoded, and
                count, once. No span may reach into them.
            sites: of "residual", "attention" and "mlp".
            layers: block indices; None is every layer that has the site.

        Returns:
            site to layer to float32 array of shape (len(spans), n_embd).

        Raises:
            SteeringError: as `capture`, or more sequences or tokens than fit.
        """
        if len(sequences) > 1 and not self.batches_sequences:
            raise HookError("recurrent and hybrid models are captured one sequence at a time")
        if not 0 < len(sequences) <= self.max_sequences:
            raise SteeringError(
                f"cannot capture {len(sequences)} sequences at once: between 1 and "
                f"max_sequences={self.max_sequences}"
            )
        wanted = wanted_layers(self.sites, sites, layers)
        return self._capture(spans_capture(sequences, spans, owners, wanted, shared))

    def _capture(self, request: CaptureRequest) -> Activations:
        limit = self.n_ctx if len(request.sequences) == 1 else self.n_batch
        if not 0 < len(request.groups) <= limit:
            raise SteeringError(
                f"cannot capture {len(request.groups)} tokens: between 1 and {limit} fit "
                f"(n_ctx={self.n_ctx}, n_batch={self.n_batch})"
            )
        flags = np.zeros((len(SITES), self.n_layer), np.uint8)
        for site, chosen in request.wanted.items():
            flags[SITES.index(site), chosen] = 1
        # After the last block's attention llama.cpp keeps only the rows whose logits are asked for.
        every_row = flags[:, self.n_layer - 1].any(where=np.array(SITES) != "attention")
        with self.lock:
            self.require_open()
            self.drop_foreign()
            try:
                self._hook.begin_capture(
                    wanted=flags.reshape(-1),
                    slots=request.groups,
                    n_slots=int(request.groups.max()) + 1,
                    n_layer=self.n_layer,
                    n_embd=self.n_embd,
                )
            except ValueError as error:
                raise SteeringError(str(error)) from None
            try:
                self.memory.clear(data=True)
                if len(request.sequences) > 1:
                    self._decode_together(request, EVERY_ROW if every_row else NO_ROW)
                else:
                    self._decode_alone(request.sequences[0], EVERY_ROW if every_row else LAST_ROW)
            finally:
                captured = self._hook.end_capture()
                self.memory.clear(data=True)
            try:
                return {
                    site: {i: captured.read(getattr(_native.Site, site), i) for i in chosen}
                    for site, chosen in request.wanted.items()
                }
            except RuntimeError as error:
                raise HookError(f"capture is incomplete: {error}") from None

    def _decode_together(self, request: CaptureRequest, outputs: int) -> None:
        batch = DecodeBatch(len(request.groups))
        shared = request.shared
        batch.add_shared(len(request.sequences), request.sequences[0][:shared], outputs)
        for number, tokens in enumerate(request.sequences):
            batch.add(number, shared, tokens[shared:], outputs)
        self.decode(batch)

    def _decode_alone(self, tokens: Sequence[int], outputs: int) -> None:
        chunks = chunked(0, len(tokens), self.n_batch, outputs)
        batch = DecodeBatch(min(len(tokens), self.n_batch))
        with self.decoding(chunks):
            for slot, start, n, _ in chunks:
                batch.clear()
                batch.add(slot, start, tokens[start : start + n], outputs)
                self._decode(batch)
