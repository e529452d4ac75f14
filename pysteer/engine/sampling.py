"""One chain of samplers per request: the chain of llama-cpp-python, over that request's tokens."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama
from llama_cpp.llama_grammar import LlamaGrammar

from pysteer import _native
from pysteer.errors import SteeringError, quoted

Processor = Callable[[npt.NDArray[np.intc], npt.NDArray[np.single]], npt.NDArray[np.single]]

_MIROSTAT_M = 100  # as llama-cpp-python sets it
_MIN_KEEP = 1


class CandidateTokens:
    """All tokens with their logits, in the form that llama.cpp's samplers take.

    One object serves all requests: `llama_sampler_sample` would keep 12 bytes per token of the
    vocabulary for each.
    """

    def __init__(self, n_vocab: int) -> None:
        # As llama_token_data: id, logit, probability; two matrices, because numpy copies records
        # one by one.
        self._tokens = np.zeros((n_vocab, 3), np.int32)
        self._logits = self._tokens.view(np.float32)[:, 1]
        self._unsorted = np.zeros((n_vocab, 3), np.int32)
        self._unsorted[:, 0] = np.arange(n_vocab)
        self._array = llama_cpp.llama_token_data_array()
        self._data: Any = ctypes.cast(
            self._tokens.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)
        )

    def draw(self, chain: Any, logits: npt.NDArray[np.float32]) -> int:
        """Return the token that a chain of samplers draws from logits of shape (n_vocab,).

        Raises:
            SteeringError: the chain leaves no token; a grammar would end the process over any.
        """
        array = self._array
        np.copyto(self._tokens, self._unsorted)  # samplers sort
        self._logits[:] = logits
        array.data, array.size, array.selected = self._data, len(self._tokens), -1
        array.sorted = False
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        chosen = array.data[array.selected] if array.selected >= 0 else None
        if chosen is None or not math.isfinite(chosen.logit):
            raise SteeringError(
                "no token can be drawn: the grammar, a logits processor, logit_bias and the "
                "sampling arguments together leave no finite logit"
            )
        token = int(chosen.id)
        llama_cpp.llama_sampler_accept(chain, token)
        return token


class Sampler:
    """Draws one request's tokens. Keeps its state (seed, penalties, grammar) between them.

    Args:
        llm: the model.
        arguments: all arguments of `create_completion`.
        seed: of this request.
        tokens: returns the request's evaluated tokens, for logits processors.

    Raises:
        SteeringError: a grammar that llama.cpp cannot parse, or a bias for an unknown token.
    """

    def __init__(
        self,
        llm: Llama,
        arguments: Mapping[str, Any],
        *,
        seed: int,
        tokens: Callable[[], npt.NDArray[np.intc]],
    ) -> None:
        self._tokens = tokens
        self._processors: list[Processor] = list(arguments["logits_processor"] or [])
        if arguments["logit_bias"] is not None:
            self._processors.append(_bias(arguments["logit_bias"], llm.n_vocab()))
        self._chain = _chain(llm, arguments, seed)
        self._free = weakref.finalize(self, llama_cpp.llama_sampler_free, self._chain)
        self._free.atexit = False

    def sample(self, candidates: CandidateTokens, logits: npt.NDArray[np.float32]) -> int:
        """Draw the next token from logits of shape (n_vocab,).

        Raises:
            SteeringError: a logits processor returned no logits, or none to draw from.
            BaseException: raised by a logits processor.
        """
        if self._processors:
            logits = self._processed(logits)
        return candidates.draw(self._chain, logits)

    def _processed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scores = logits.copy()
        for processor in self._processors:
            scores = processor(self._tokens(), scores)
        with np.errstate(over="ignore"):  # infinity raises below
            scores = np.asarray(scores, np.single)
        if scores.shape != logits.shape:
            raise SteeringError(
                f"a logits processor returned shape {scores.shape}, not {logits.shape}"
            )
        if not _native.has_usable_logits(np.ascontiguousarray(scores)):
            raise SteeringError(
                "no token can be drawn: a logits processor or logit_bias made a logit NaN or "
                "+infinity, or all of them -infinity"
            )
        return scores

    def close(self) -> None:
        """Free the chain; must happen before the model is freed. May be called again."""
        self._free()


def _chain(llm: Llama, arguments: Mapping[str, Any], seed: int) -> Any:
    """Return a chain of samplers in the order of `llama_cpp.Llama`."""
    n_vocab = llm.n_vocab()
    grammar: LlamaGrammar | None = arguments["grammar"]
    constraint = [] if grammar is None else [_grammar_sampler(llm, grammar)]
    stages = [
        _penalties(
            n_vocab,
            llm.last_n_tokens_size,
            arguments["repeat_penalty"],
            arguments["frequency_penalty"],
            arguments["presence_penalty"],
        ),
        *constraint,
    ]
    temperature, mirostat = arguments["temperature"], arguments["mirostat_mode"]
    tau, eta = arguments["mirostat_tau"], arguments["mirostat_eta"]
    if temperature < 0.0:
        stages.append(llama_cpp.llama_sampler_init_dist(seed))
    elif temperature == 0.0:
        stages.append(llama_cpp.llama_sampler_init_greedy())
    elif mirostat == 1:
        stages.append(llama_cpp.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M))
    elif mirostat == 2:
        stages.append(llama_cpp.llama_sampler_init_mirostat_v2(seed, tau, eta))
    else:
        stages += [
            llama_cpp.llama_sampler_init_top_k(arguments["top_k"]),
            llama_cpp.llama_sampler_init_typical(arguments["typical_p"], _MIN_KEEP),
            llama_cpp.llama_sampler_init_top_p(arguments["top_p"], _MIN_KEEP),
            llama_cpp.llama_sampler_init_min_p(arguments["min_p"], _MIN_KEEP),
            llama_cpp.llama_sampler_init_temp(temperature),
            llama_cpp.llama_sampler_init_dist(seed),
        ]
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for stage in stages:
        llama_cpp.llama_sampler_chain_add(chain, stage)
    return chain


def _penalties(n_vocab: int, *values: float) -> Any:
    """Return the sampler of penalties; some versions of llama.cpp also ask for `n_vocab`."""
    create: Any = llama_cpp.llama_sampler_init_penalties
    with_vocabulary = len(create.argtypes) > len(values)  # ctypes lets a surplus argument pass
    return create(n_vocab, *values) if with_vocabulary else create(*values)


def _grammar_sampler(llm: Llama, grammar: LlamaGrammar) -> Any:
    sampler = llama_cpp.llama_sampler_init_grammar(
        llama_cpp.llama_model_get_vocab(llm.model),
        grammar._grammar.encode("utf-8"),
        grammar._root.encode("utf-8"),
    )
    if not sampler:  # llama.cpp would crash
        raise SteeringError(f"llama.cpp cannot parse the grammar {quoted(grammar._grammar)}")
    return sampler


def _bias(logit_bias: Mapping[Any, float], n_vocab: int) -> Processor:
    biases = {int(token): float(bias) for token, bias in logit_bias.items()}
    for token in biases:
        if not 0 <= token < n_vocab:
            raise SteeringError(f"logit_bias: unknown token {token}; tokens are 0 to {n_vocab - 1}")
    tokens = np.fromiter(biases.keys(), np.intp, len(biases))
    with np.errstate(over="ignore"):
        values = np.fromiter(biases.values(), np.float32, len(biases))
    if np.isnan(values).any() or np.isposinf(values).any():
        raise SteeringError("logit_bias: a bias is NaN, or too large; -inf bans a token")

    def process(
        _tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
    ) -> npt.NDArray[np.single]:
        scores = scores.copy()
        scores[tokens] += values
        return scores

    return process
