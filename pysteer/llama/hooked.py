"""`HookedLlama`: a `llama_cpp.Llama` with the native hook in its context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

from pysteer import _native
from pysteer.chat.template import settle_format
from pysteer.errors import SteeringError
from pysteer.files import check_regular
from pysteer.llama.arguments import require_known
from pysteer.llama.batch import EVERY_ROW, LAST_ROW, chunked
from pysteer.llama.capture import Activations
from pysteer.llama.context import HookedContext, SpoiledDecodeError
from pysteer.llama.devices import PlacedLlama
from pysteer.llama.forks import bind_to_process
from pysteer.llama.log import kept_errors, with_cause
from pysteer.llama.versions import load_native
from pysteer.pack.pack import BaseModel

_Method = TypeVar("_Method", bound=Callable[..., Any])


def quiet_arguments(n_threads: int | None = None, **llama_arguments: Any) -> dict[str, Any]:
    """Return arguments of `llama_cpp.Llama`: silent, and as many threads for prompts as for text.

    Args:
        n_threads: threads to use; None: all cores.
        **llama_arguments: further arguments, which replace these defaults.
    """
    threads = n_threads or os.cpu_count() or 1
    return {
        "verbose": False,
        "n_threads": threads,
        "n_threads_batch": threads,
        **llama_arguments,
    }


def _require_room(max_sequences: int, llama_arguments: Mapping[str, Any]) -> None:
    """llama.cpp ends the process where a batch has no room for a token of each sequence."""
    for name in ("n_batch", "n_ctx"):
        size = llama_arguments.get(name, 512)
        if 0 < size < max_sequences:
            raise SteeringError(
                f"{name}={size} has no room for a token of each of max_sequences={max_sequences}; "
                f"raise {name} or lower max_sequences"
            )


def _while_open(method: _Method) -> _Method:
    """Raise SteeringError on a closed model, where llama.cpp would crash."""

    @wraps(method)
    def checked(self: HookedLlama, *args: Any, **kwargs: Any) -> Any:
        self.require_open()
        return method(self, *args, **kwargs)

    return cast(_Method, checked)


class HookedLlama(PlacedLlama):
    """A `llama_cpp.Llama` whose layer outputs can be read and changed through `context`.

    Takes every argument of `llama_cpp.Llama`. Safe to create from several threads at once. One
    instance serves one thread at a time; `close()` from another thread waits for the running step.
    Chats are rendered by the model's own template, unless `chat_format` or `chat_handler` is given.
    A file without a template keeps llama-cpp-python's guess; no router decides on such a chat.

    Args:
        model_path: a GGUF model.
        max_sequences: number of sequences that one decode may hold.
        rpc_servers: "HOST:PORT" of servers that hold layers of the model; see docs/devices.md. All
            layers are offloaded, unless n_gpu_layers is given.
        **llama_arguments: all arguments of `llama_cpp.Llama`.

    Attributes:
        context: sites, decodes, steering of sequences and captures.
        draws_from_logits: `generate` evaluates nothing for a prompt that the context ends with; in
            some versions of llama-cpp-python it always evaluates the last token.

    Raises:
        HookError: the llama.cpp or the model cannot be hooked.
        SteeringError: the model cannot be loaded, an argument or the chat format is unknown,
            n_batch or n_ctx is smaller than max_sequences, or an RPC server does not answer.

    Examples:
        >>> from pysteer import shipped
        >>> llm = HookedLlama(shipped.default_model(), verbose=False)
        >>> llm.n_layer, len(llm.sites["residual"])
        (30, 30)
        >>> rows = llm.capture(llm.tokenize(b"Good morning"), layers=[10, 20])
        >>> rows["residual"][20].shape
        (576,)
        >>> llm.close()
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        max_sequences: int = 1,
        rpc_servers: Sequence[str] = (),
        **llama_arguments: Any,
    ) -> None:
        require_known(llama_arguments, type(self))
        load_native()
        if max_sequences > 1:
            _require_room(max_sequences, llama_arguments)
        self.context = HookedContext(max_sequences)
        bind_to_process(self)
        path = os.fspath(model_path)
        if os.path.lexists(path):
            check_regular(Path(path))  # llama.cpp would wait for a pipe
        with kept_errors() as errors:
            try:
                super().__init__(path, rpc_servers=rpc_servers, **llama_arguments)
            except SteeringError:
                raise
            except ValueError as error:
                cause = str(error).removesuffix(f": {path}")
                # An error that names no file is about an argument.
                hint = "; is it a GGUF model?" if cause != str(error) else ""
                raise SteeringError(with_cause(f"{path}: {cause}", errors) + hint) from None
        self.draws_from_logits = "_requires_eval" in vars(self)
        self.input_ids.fill(0)  # image handlers make prompts of ids that nobody has written
        speculates = llama_arguments.get("draft_model") is not None
        if speculates and not llama_arguments.get("logits_all"):
            # llama_cpp.Llama then writes the logits of every token, and makes room for n_batch.
            self.scores = np.ndarray((len(self.input_ids), self.n_vocab()), np.single)
        self._outputs = EVERY_ROW if llama_arguments.get("logits_all") or speculates else LAST_ROW
        try:
            settle_format(self, llama_arguments)
            self.context.attach(super().ctx, n_batch=self.n_batch)
            if not llama_arguments.get("vocab_only"):  # else there is nothing to hook
                self.context.probe()
        except BaseException:
            self.close()
            raise

    # Versions of llama_cpp.Llama that can draw from the logits in the context set this for each
    # instance. In others it stays True: they always evaluate a prompt's last token.
    _requires_eval = True

    # llama_cpp.Llama.__init__ assigns a fresh llama_context_params to this name before it creates
    # the context, and has no argument for the callback. A property sees that assignment on this
    # instance alone, so nothing global is replaced and threads cannot meet.
    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        """Parameters of the context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        self.context.install(params)
        self._context_params = params

    def require_open(self) -> None:
        """Raise SteeringError if the model is closed."""
        self.context.require_open()

    @property
    def keeps_logits(self) -> bool:
        """True if `scores` holds logits of every token in the context, not of the last alone."""
        return self._outputs == EVERY_ROW

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self.context.closed

    def leave(self) -> None:
        """Become the copy in a forked process, which never uses or frees the model.

        llama.cpp's threads do not exist in the process, and devices refuse calls from it.
        """
        self.context.leave()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def close(self) -> None:
        """Free the model. Waits for a running step; may be called again."""
        context = self.__dict__.get("context")
        if context is None or context.left:  # the constructor failed, or a forked process
            return
        with context.lock:
            context.close()
            super().close()

    # ---- the model ---------------------------------------------------------------------------

    @property
    def n_layer(self) -> int:
        """Number of blocks."""
        return self.context.n_layer

    @property
    def base_model(self) -> BaseModel:
        """Identity of the model, the same for all its quantisations."""
        return BaseModel(
            architecture=self.metadata.get("general.architecture", ""),
            name=self.metadata.get("general.name", ""),
            n_layer=self.n_layer,
            n_embd=self.n_embd(),
            n_vocab=self.n_vocab(),
        )

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site to the layers at which this model's graph has the site, ascending."""
        return self.context.sites

    @property
    def ctx(self) -> llama_cpp.llama_context_p:
        """The llama_context."""
        self.require_open()
        return super().ctx

    @property
    def model(self) -> llama_cpp.llama_model_p:
        """The llama_model."""
        self.require_open()
        return super().model

    n_ctx = _while_open(Llama.n_ctx)
    n_embd = _while_open(Llama.n_embd)
    n_vocab = _while_open(Llama.n_vocab)
    token_bos = _while_open(Llama.token_bos)
    token_eos = _while_open(Llama.token_eos)
    token_nl = _while_open(Llama.token_nl)
    pooling_type = _while_open(Llama.pooling_type)
    tokenize = _while_open(Llama.tokenize)
    detokenize = _while_open(Llama.detokenize)
    reset = _while_open(Llama.reset)
    embed = _while_open(Llama.embed)
    save_state = _while_open(Llama.save_state)
    load_state = _while_open(Llama.load_state)

    # ---- decode ------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those in the context; see `llama_cpp.Llama.eval`.

        Raises:
            HookError: a site that is to be steered was not reached by every token, or the hidden
                state or the logits are not finite. The context is empty then.
        """
        left = list(tokens)
        while True:
            # A gate's decision holds for the next token at all layers, so end this decode there.
            decision = self.context.next_decision(0)
            n = decision + 1 - self.n_tokens if decision >= self.n_tokens else len(left)
            part, left = left[:n], left[n:]
            runs = chunked(self.n_tokens, len(part), self.n_batch, self._outputs)
            try:
                with self.context.decoding(runs):
                    super().eval(part)
                self._require_usable_logits(len(part))
            except SpoiledDecodeError:
                # A freed cell still counts: a weight of 0 times NaN is NaN.
                self.context.memory.clear(data=True)
                self.reset()
                raise
            if not left:
                return

    def _require_usable_logits(self, n_tokens: int) -> None:
        """Raise SpoiledDecodeError if the logits of the latest tokens leave no token to draw."""
        if n_tokens == 0 or self.context_params.embeddings:
            return
        rows: Iterable[npt.NDArray[np.float32]] = [self.context.logits(-1)]
        if self.keeps_logits:
            rows = self.scores[self.n_tokens - n_tokens : self.n_tokens]
        if not all(_native.has_usable_logits(row) for row in rows):
            raise SpoiledDecodeError("the model computed logits that are not finite")

    def capture(self, *args: Any, **kwargs: Any) -> Activations:
        """Return activations of a prompt; see `HookedContext.capture`."""
        return self._captured(self.context.capture, *args, **kwargs)

    def capture_means(self, *args: Any, **kwargs: Any) -> Activations:
        """Return mean activations over spans of sequences; see `HookedContext.capture_means`."""
        return self._captured(self.context.capture_means, *args, **kwargs)

    def _captured(
        self, capture: Callable[..., Activations], *args: Any, **kwargs: Any
    ) -> Activations:
        with self.context.lock:
            self.require_open()
            try:
                return capture(*args, **kwargs)
            finally:
                if self.context.memory.is_empty:  # not where the arguments were refused
                    self.reset()
