"""A llama.cpp context with the native hook installed.

What the runtime and the extraction from GGUF models both stand on: it knows the model's sites,
brackets every decode, captures activations, and adds nothing by itself.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt

from pysteer import _native
from pysteer.chat.template import chooses_format, use_own_template
from pysteer.errors import HookError, SteeringError
from pysteer.pack.pack import BaseModel
from pysteer.pack.vector import SITES

TESTED_LLAMA_CPP = ("0.3.36",)
"""Versions of llama-cpp-python that the test suite has passed with."""

Run: TypeAlias = tuple[int, int, int, int]
"""Rows of a batch that follow each other in one sequence: the sequence's number, the position of
the first, how many, and whose logits are asked for: `NO_ROW`, `LAST_ROW` or `EVERY_ROW`."""

NO_ROW, LAST_ROW, EVERY_ROW = 0, 1, 2

UNTESTED_OVERRIDE = "PYSTEER_UNTESTED_LLAMA_CPP"
"""Environment variable: set to 1 to try another version."""


def load_native() -> None:
    """Tie the native part to the llama.cpp that `llama_cpp` has loaded. Free after the first call.

    Raises:
        HookError: the version is untested, a function is missing, or a structure is laid out
            otherwise than expected.
    """
    version = llama_cpp.__version__
    works = f"pysteer works with llama-cpp-python {', '.join(TESTED_LLAMA_CPP)}"
    if version not in TESTED_LLAMA_CPP and os.environ.get(UNTESTED_OVERRIDE) != "1":
        raise HookError(
            f"llama-cpp-python {version} is untested: {works}; "
            f"install that, or set {UNTESTED_OVERRIDE}=1 to try this one"
        )
    library = llama_cpp.llama_cpp._lib
    try:
        _native.load_abi(library._handle, str(Path(library._name).parent))
    except RuntimeError as error:
        raise HookError(f"llama-cpp-python {version}: {error}; {works}") from None


def set_native_control_vector(llm: llama_cpp.Llama, rows: npt.NDArray[np.float32]) -> None:
    """Give a context a control vector through llama.cpp's own function.

    On a `SteeredLlama` use `steering` instead: there the control-vector tensors are pysteer's.

    Args:
        llm: the model.
        rows: shape (n_layer - 1, n_embd), float32: what is added to the output of blocks 1 to
            n_layer - 1. All of them, because llama.cpp leaves layers beyond the buffer as they
            were.

    Raises:
        HookError: llama.cpp refused it.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_embd = rows.shape
    status = llama_cpp.llama_set_adapter_cvec(
        llm.ctx, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), rows.size, n_embd, 1, n_rows
    )
    if status != 0:
        raise HookError("llama.cpp refused a control vector for this model")


def _require_room(max_sequences: int, llama_arguments: Mapping[str, Any]) -> None:
    """llama.cpp ends the process where a batch has no room for a token of each sequence."""
    for name in ("n_batch", "n_ctx"):
        size = llama_arguments.get(name, 512)
        if 0 < size < max_sequences:
            raise SteeringError(
                f"{name}={size} has no room for a token of each of max_sequences={max_sequences}; "
                f"raise {name} or lower max_sequences"
            )


class HookedLlama(llama_cpp.Llama):
    """A `llama_cpp.Llama` whose layer outputs can be read and, by a subclass, changed.

    Takes every argument of `llama_cpp.Llama`. Safe to create from several threads at once. One
    instance serves one thread at a time; `close()` from another thread waits for the running step.
    Chats are rendered by the model's own template, unless `chat_format` or `chat_handler` is given.

    Args:
        model_path: a GGUF model.
        max_sequences: how many sequences `capture_means` can decode in one batch.
        **llama_arguments: everything that `llama_cpp.Llama` takes.

    Raises:
        HookError: the llama.cpp or the model cannot be hooked.
        SteeringError: n_batch or n_ctx is smaller than max_sequences.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        max_sequences: int = 1,
        **llama_arguments: Any,
    ) -> None:
        load_native()
        if max_sequences > 1:
            _require_room(max_sequences, llama_arguments)
        self._max_sequences = max_sequences
        self._hook = _native.Hook()
        self._step_lock = threading.RLock()
        self._closed = False
        super().__init__(os.fspath(model_path), **llama_arguments)
        if not chooses_format(llama_arguments):
            use_own_template(self)
        # The context holds the hook's address; tie their lives together.
        setattr(self._ctx, "_pysteer_hook", self._hook)  # noqa: B010
        self._n_layer = int(llama_cpp.llama_model_n_layer(self._model.model))
        try:
            if not llama_arguments.get("vocab_only"):  # else there is nothing to hook
                self._probe()
        except BaseException:
            self.close()
            raise

    # llama_cpp.Llama.__init__ assigns a fresh llama_context_params to this name before it creates
    # the context, and has no argument for the callback. A property sees that assignment on this
    # instance alone, so nothing global is replaced and threads cannot meet.
    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        """The parameters the context was created with."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(_native.callback_address)
        params.cb_eval_user_data = ctypes.c_void_p(self._hook.address)
        if self._max_sequences > 1:
            params.n_seq_max = self._max_sequences
            params.kv_unified = True  # rows then come in the order of the batch
        self._context_params = params

    @property
    def n_layer(self) -> int:
        """Number of blocks."""
        return self._n_layer

    @property
    def max_sequences(self) -> int:
        """How many sequences `capture_means` can decode in one batch."""
        return self._max_sequences

    @property
    def batches_sequences(self) -> bool:
        """Whether one decode may hold tokens of several sequences.

        Recurrent and hybrid models: no. llama.cpp orders the rows of their batches by sequence, not
        as they came.
        """
        return not (self._is_recurrent or self._is_hybrid)

    @property
    def base_model(self) -> BaseModel:
        """What identifies this model, whatever its quantisation."""
        return BaseModel(
            architecture=self.metadata.get("general.architecture", ""),
            name=self.metadata.get("general.name", ""),
            n_layer=self.n_layer,
            n_embd=self.n_embd(),
            n_vocab=self.n_vocab(),
        )

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site to the layers at which this model's graph has it, ascending."""
        return {
            site: tuple(sorted(f.layer for f in self._hook.sites if f.site.name == site))
            for site in SITES
        }

    @property
    def site_nodes(self) -> list[tuple[str, int, str, str]]:
        """Per site and layer: site, layer, name of the graph node, name of the memory it is in."""
        return [(f.site.name, f.layer, f.node, f.backend) for f in self._hook.sites]

    def _probe(self) -> None:
        """Find the sites by one decode, and leave the context as if it had not happened.

        Each control-vector tensor is filled with its layer's number, which is how the native part
        recognises whose it is. Afterwards the tensors stay in the graph and hold zeros.
        """
        if llama_cpp.llama_model_has_encoder(self._model.model):
            raise HookError("models with an encoder cannot be hooked; decoder-only models can")
        n_embd = self.n_embd()
        if self._n_layer > 1:
            layers = np.arange(1, self._n_layer, dtype=np.float32)
            set_native_control_vector(self, np.repeat(layers[:, None], n_embd, axis=1))
        self._hook.begin_probe(self._n_layer, n_embd)
        token = max(self.token_bos(), 0)
        try:
            self._batch.set_batch(batch=[token], n_past=0, logits_all=True)
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            raise HookError(f"the model could not be probed: {error}") from None
        finally:
            self._hook.end_probe()
        self._ctx.kv_cache_clear()
        llama_cpp.llama_perf_context_reset(self.ctx)
        self.n_tokens = 0
        self._requires_eval = True
        if not self._hook.sites:
            raise HookError(
                f"architecture {self.base_model.architecture!r} cannot be hooked: its graph has "
                "neither a control-vector node nor an attention output projection"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise SteeringError("the model is closed; create a new one")

    def _set_sequence(self, slot: int, sequence: _native.Sequence | None) -> None:
        """Steer the tokens of a sequence of llama.cpp's batches, from the next decode on.

        Raises:
            HookError: the model lacks a site of the plan.
        """
        try:
            self._hook.set_sequence(slot, sequence)
        except (ValueError, RuntimeError) as error:
            raise HookError(str(error)) from None

    @contextmanager
    def _decoding(self, runs: Sequence[Run] | npt.NDArray[np.int32]) -> Iterator[None]:
        """Bracket the decodes of one evaluation; afterwards, hold the hook to what it did.

        Args:
            runs: the rows to be decoded, in order.
        """
        with self._step_lock:
            self._require_open()
            try:
                self._hook.begin_decode(np.asarray(runs, np.int32).reshape(-1, 4))
            except _native.NotOnHost:
                raise
            except (ValueError, RuntimeError) as error:
                raise HookError(str(error)) from None
            try:
                yield
            except BaseException:
                self._hook.abandon_decode()
                raise
            try:
                self._hook.end_decode()
            except RuntimeError as error:
                self.reset()  # what was just computed is not what was asked for
                raise HookError(str(error)) from None

    def _chunks(self, start: int, n_tokens: int, outputs: int) -> list[Run]:
        """The decodes of one sequence's tokens, of at most n_batch each."""
        stop = start + n_tokens
        return [
            (0, at, min(self.n_batch, stop - at), outputs)
            for at in range(start, stop, self.n_batch)
        ]

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those in the context; see `llama_cpp.Llama.eval`.

        Raises:
            HookError: a site that is to be steered was not reached by every token.
        """
        outputs = EVERY_ROW if self._logits_all else LAST_ROW
        left = list(tokens)
        while True:
            # What a gate decides holds for the next token at all layers, so that is in a later one.
            decision = self._hook.next_decision(0)
            n = decision + 1 - self.n_tokens if decision >= self.n_tokens else len(left)
            part, left = left[:n], left[n:]
            with self._decoding(self._chunks(self.n_tokens, len(part), outputs)):
                super().eval(part)
            if not left:
                return

    def capture(
        self,
        tokens: Sequence[int],
        *,
        sites: Iterable[str] = ("residual",),
        layers: Iterable[int] | None = None,
        pool: Literal["last", "mean", "all"] = "last",
        span: tuple[int, int] | None = None,
    ) -> dict[str, dict[int, npt.NDArray[np.float32]]]:
        """Activations of a prompt, as the rest of the model sees them.

        Starts from an empty context and leaves an empty one. Pooling happens natively while the
        prompt is decoded, without the GIL; what the model computes after the last site wanted is
        skipped.

        Args:
            tokens: the prompt, at most n_ctx tokens.
            sites: of "residual", "attention" and "mlp".
            layers: block indices; None is every layer that has the site.
            pool: "last" token of the span, "mean" over it (summed in float64), or "all" its rows.
            span: token range [start, stop); None is the whole prompt.

        Returns:
            site to layer to float32 array, of shape (n_embd,) for "last" and "mean" and
            (stop - start, n_embd) for "all".

        Raises:
            SteeringError: an unknown site or pooling, a layer without the site, an empty or
                impossible span, too many tokens.
            NotImplementedError: the activations are not in host memory.
        """
        tokens = list(tokens)
        start, stop = span if span is not None else (0, len(tokens))
        slots = np.full(len(tokens), -1, np.int32)
        if tokens and not 0 <= start < stop <= len(tokens):
            raise SteeringError(
                f"the token range [{start}, {stop}) is empty or outside the {len(tokens)} tokens"
            )
        if pool == "last":
            slots[stop - 1 : stop] = 0
        elif pool == "mean":
            slots[start:stop] = 0
        elif pool == "all":
            slots[start:stop] = np.arange(stop - start)
        else:
            raise SteeringError(f"unknown pooling {pool!r}; use last, mean, all")
        rows = self._capture([tokens], slots, self._wanted(sites, layers))
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
    ) -> dict[str, dict[int, npt.NDArray[np.float32]]]:
        """Mean activations over spans of several sequences, decoded as one batch.

        Args:
            sequences: token sequences, each for itself from position 0; at most `max_sequences` of
                them, together at most n_batch tokens (one alone: n_ctx).
            spans: token ranges [start, stop), at least one in each sequence; those of one sequence
                do not overlap.
            owners: for each span the number of its sequence; None is one span in each, in order.
            shared: how many tokens all sequences begin with; they are decoded, and count, once. No
                span may reach into them.
            sites: of "residual", "attention" and "mlp".
            layers: block indices; None is every layer that has the site.

        Returns:
            site to layer to float32 array of shape (len(spans), n_embd).

        Raises:
            SteeringError: as `capture`, or more sequences or tokens than fit.
            NotImplementedError: the activations are not in host memory.
        """
        if len(sequences) > 1 and not self.batches_sequences:
            raise HookError("recurrent and hybrid models are captured one sequence at a time")
        if not 0 < len(sequences) <= self._max_sequences:
            raise SteeringError(
                f"cannot capture {len(sequences)} sequences at once: between 1 and "
                f"max_sequences={self._max_sequences}"
            )
        owners = range(len(sequences)) if owners is None else owners
        slots = [np.full(len(tokens), -1, np.int32) for tokens in sequences]
        for span, (number, (start, stop)) in enumerate(zip(owners, spans, strict=True)):
            tokens = sequences[number]
            if not 0 <= start < stop <= len(tokens):
                raise SteeringError(
                    f"the token range [{start}, {stop}) is empty or outside the {len(tokens)} "
                    f"tokens of sequence {number}"
                )
            if not 0 <= shared <= start or tokens[:shared] != sequences[0][:shared]:
                raise SteeringError(
                    f"sequence {number} does not share its first {shared} tokens, or is to be "
                    "captured there"
                )
            if (slots[number][start:stop] >= 0).any():
                raise SteeringError(f"token ranges of sequence {number} overlap")
            slots[number][start:stop] = span
        if set(owners) != set(range(len(sequences))):
            raise SteeringError("a sequence has no token range")
        return self._capture(
            sequences,
            np.concatenate([np.full(shared, -1, np.int32), *(own[shared:] for own in slots)]),
            self._wanted(sites, layers),
            shared=shared,
        )

    def _capture(
        self,
        sequences: Sequence[Sequence[int]],
        slots: npt.NDArray[np.int32],
        wanted: Mapping[str, list[int]],
        *,
        shared: int = 0,
    ) -> dict[str, dict[int, npt.NDArray[np.float32]]]:
        """Means of the tokens that share a slot; site to layer to (slots, n_embd)."""
        limit = self.n_ctx() if len(sequences) == 1 else self.n_batch
        if not 0 < len(slots) <= limit:
            raise SteeringError(
                f"cannot capture {len(slots)} tokens: between 1 and {limit} fit "
                f"(n_ctx={self.n_ctx()}, n_batch={self.n_batch})"
            )
        flags = np.zeros((len(SITES), self.n_layer), np.uint8)
        for site, chosen in wanted.items():
            flags[SITES.index(site), chosen] = 1
        # After the last block's attention llama.cpp keeps only the rows whose logits are asked for.
        every_row = any(
            site != "attention" and self.n_layer - 1 in chosen for site, chosen in wanted.items()
        )
        with self._step_lock:
            self._require_open()
            try:
                self._hook.begin_capture(
                    wanted=flags.reshape(-1),
                    slots=slots,
                    n_slots=int(slots.max()) + 1,
                    n_layer=self.n_layer,
                    n_embd=self.n_embd(),
                )
            except _native.NotOnHost:
                raise
            except ValueError as error:
                raise SteeringError(str(error)) from None
            try:
                self._decode_sequences(sequences, shared, every_row=every_row)
            finally:
                captured = self._hook.end_capture()
                self._ctx.kv_cache_clear()
                self.reset()
            try:
                return {
                    site: {i: captured.read(getattr(_native.Site, site), i) for i in chosen}
                    for site, chosen in wanted.items()
                }
            except RuntimeError as error:
                raise HookError(f"capture is incomplete: {error}") from None

    def _wanted(
        self, sites: Iterable[str], layers: Iterable[int] | None
    ) -> Mapping[str, list[int]]:
        available = self.sites
        wanted: dict[str, list[int]] = {}
        asked = None if layers is None else sorted({int(layer) for layer in layers})
        for site in sites:
            if site not in available:
                raise SteeringError(f"unknown site {site!r}; use one of {', '.join(SITES)}")
            if not available[site]:
                raise HookError(f"this model's graph has no {site} site")
            wanted[site] = list(available[site]) if asked is None else asked
            missing = sorted(set(wanted[site]) - set(available[site]))
            if missing:
                raise HookError(f"this model's graph has no {site} site at layers {missing}")
        if not any(wanted.values()):
            raise SteeringError("nothing to capture: name at least one site and one layer")
        return wanted

    def _decode_sequences(
        self, sequences: Sequence[Sequence[int]], shared: int, *, every_row: bool
    ) -> None:
        """Decode from an empty context: several sequences as one batch, or one as many as needed.

        The logits are left undefined.
        """
        self._ctx.kv_cache_clear()
        self.n_tokens = 0
        outputs = EVERY_ROW if every_row else NO_ROW
        if len(sequences) > 1:
            everyone = range(len(sequences))
            self._batch.reset()
            self._add(sequences[0][:shared], 0, everyone, every_row)
            runs = [(-1, 0, shared, outputs)]
            for number, tokens in enumerate(sequences):
                self._add(tokens[shared:], shared, [number], every_row)
                runs.append((number, shared, len(tokens) - shared, outputs))
            with self._decoding(runs):
                self._ctx.decode(self._batch)
            self.n_tokens = self._batch.n_tokens()
            return
        tokens = list(sequences[0])
        chunks = self._chunks(0, len(tokens), EVERY_ROW if every_row else LAST_ROW)
        with self._decoding(chunks):
            for _, at, count, _ in chunks:
                part = tokens[at : at + count]
                self._batch.set_batch(batch=part, n_past=at, logits_all=every_row)
                self._ctx.decode(self._batch)
                self.n_tokens += len(part)

    def _add(
        self, tokens: Sequence[int], position: int, sequences: Sequence[int], every_row: bool
    ) -> None:
        """Add tokens to the batch, as part of each of the sequences."""
        batch = self._batch.batch
        for offset, token in enumerate(tokens):
            at = batch.n_tokens
            batch.token[at] = token
            batch.pos[at] = position + offset
            batch.n_seq_id[at] = len(sequences)
            for number, sequence in enumerate(sequences):
                batch.seq_id[at][number] = sequence
            batch.logits[at] = every_row
            batch.n_tokens += 1

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokenize a string; see `llama_cpp.Llama.tokenize`."""
        self._require_open()
        return super().tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Detokenize tokens; see `llama_cpp.Llama.detokenize`."""
        self._require_open()
        return super().detokenize(tokens, prev_tokens, special)

    def close(self) -> None:
        """Free the model. Waits for a running step; may be called again."""
        lock = self.__dict__.get("_step_lock")
        if lock is None:  # the constructor failed before there was anything to free
            return
        with lock:
            self._closed = True
            self._hook.detach()
            if "_stack" in self.__dict__:
                super().close()
