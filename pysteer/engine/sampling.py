"""One sampler per request: llama-cpp-python's own chain, over the tokens of that request alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, LogitsProcessorList
from llama_cpp._internals import LlamaSampler
from llama_cpp.llama_grammar import LlamaGrammar

from pysteer.errors import SteeringError, quoted

Processor = Callable[[npt.NDArray[np.intc], npt.NDArray[np.single]], npt.NDArray[np.single]]

OPTIONS = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "tfs_z",
    "mirostat_mode",
    "mirostat_eta",
    "mirostat_tau",
)
"""Arguments of `create_completion` that go to the sampler as they are."""


class Candidates:
    """All tokens with their logits, in the form that llama.cpp's samplers take.

    One for all requests: `llama_sampler_sample` would keep as much for each, which is 12 bytes per
    token of the vocabulary.
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

    def draw(self, chain: Any, context: Any, row: int) -> int:
        """What a chain of samplers makes of the logits of the batch's row `row`."""
        array, n_vocab = self._array, len(self._tokens)
        logits = llama_cpp.llama_get_logits_ith(context, row)
        np.copyto(self._tokens, self._unsorted)  # samplers sort
        self._logits[:] = np.ctypeslib.as_array(logits, shape=(n_vocab,))
        array.data, array.size, array.selected, array.sorted = self._data, n_vocab, -1, False
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        assert array.selected >= 0
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(chain, token)
        return token


class _Host:
    """What `Llama._init_sampler` reads of a `Llama`, for one request."""

    def __init__(self, llm: Llama, seed: int, tokens: Callable[[], npt.NDArray[np.intc]]) -> None:
        self._seed = seed
        self._n_vocab = llm._n_vocab
        self._model = llm._model
        self.last_n_tokens_size = llm.last_n_tokens_size
        self._tokens = tokens

    @property
    def _input_ids(self) -> npt.NDArray[np.intc]:
        return self._tokens()


class Sampler:
    """Draws one request's tokens. Keeps its state (seed, penalties, grammar) between them.

    Args:
        llm: the model.
        arguments: those of `create_completion`, all of them.
        seed: of this request.
        tokens: gives the request's evaluated tokens, for logits processors.

    Raises:
        SteeringError: a grammar that does not parse, a bias for a token that there is not.
    """

    def __init__(
        self,
        llm: Llama,
        arguments: Mapping[str, Any],
        *,
        seed: int,
        tokens: Callable[[], npt.NDArray[np.intc]],
    ) -> None:
        self._error: BaseException | None = None
        grammar: LlamaGrammar | None = arguments["grammar"]
        if grammar is not None:
            _check_grammar(llm, grammar)
        processors: list[Processor] = list(arguments["logits_processor"] or [])
        if arguments["logit_bias"] is not None:
            processors.append(_bias(arguments["logit_bias"], llm._n_vocab))
        guarded = LogitsProcessorList([self._guarded(processors)]) if processors else None
        self._chain: LlamaSampler = Llama._init_sampler(
            cast(Llama, _Host(llm, seed, tokens)),
            temp=arguments["temperature"],
            grammar=grammar,
            logits_processor=guarded,
            **{name: arguments[name] for name in OPTIONS},
        )

    def _guarded(self, processors: Sequence[Processor]) -> Processor:
        """Keep what a processor raises: an exception cannot pass through llama.cpp's frames."""

        def process(
            tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
        ) -> npt.NDArray[np.single]:
            before = scores
            try:
                for processor in processors:
                    scores = processor(tokens, scores)
                scores = np.asarray(scores, np.single)
                if scores.shape != before.shape:
                    raise SteeringError(
                        f"a logits processor returned shape {scores.shape}, not {before.shape}"
                    )
            except BaseException as error:  # not only an Exception: nothing may be lost here
                self._error = error
                return before
            return scores

        return process

    def sample(self, candidates: Candidates, context: Any, row: int) -> int:
        """Draw the token after the batch's row `row`.

        Raises:
            BaseException: whatever one of the request's logits processors raised.
        """
        token = candidates.draw(self._chain.sampler, context, row)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return token

    def close(self) -> None:
        """Free it; must happen before the model is freed. May be called again."""
        self._chain.close()


def _check_grammar(llm: Llama, grammar: LlamaGrammar) -> None:
    """A grammar that does not parse gives a null sampler, at which llama.cpp would crash."""
    sampler = llama_cpp.llama_sampler_init_grammar(
        llm._model.vocab, grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8")
    )
    if not sampler:
        raise SteeringError(f"llama.cpp cannot parse the grammar {quoted(grammar._grammar)}")
    llama_cpp.llama_sampler_free(sampler)


def _bias(logit_bias: Mapping[Any, float], n_vocab: int) -> Processor:
    biases = {int(token): float(bias) for token, bias in logit_bias.items()}
    for token in biases:
        if not 0 <= token < n_vocab:
            raise SteeringError(f"logit_bias: there is no token {token}; 0 to {n_vocab - 1} are")
    tokens = np.fromiter(biases.keys(), np.intp, len(biases))
    values = np.fromiter(biases.values(), np.float32, len(biases))

    def process(
        _tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
    ) -> npt.NDArray[np.single]:
        scores = scores.copy()
        scores[tokens] += values
        return scores

    return process
