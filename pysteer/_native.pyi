"""The native part (csrc/): the hook on llama.cpp's graphs, and the plans it carries out.

Use `pysteer.SteeredLlama` or `pysteer.HookedLlama` instead. Arrays must be C-contiguous; a wrong
shape raises ValueError, a wrong dtype TypeError. Positions count the tokens of a sequence from 0,
layers count the blocks of the model from 0.
"""

import enum
from collections.abc import Iterable
from typing import overload

import numpy as np
import numpy.typing as npt

callback_address: int
"""Address of the C function for `llama_context_params.cb_eval`."""

def load_abi(library_handle: int, library_folder: str) -> None:
    """Look up llama.cpp's functions and check the layout of its tensors. Free after the first call.

    Args:
        library_handle: handle of the loaded libllama, from dlopen or an HMODULE.
        library_folder: folder of ggml's own libraries; used on Windows only.

    Raises:
        RuntimeError: a function is missing, or the layout of tensors is unexpected.
    """

def function_address(name: str) -> int:
    """Return the address of a C function of the loaded llama.cpp or ggml; 0: it has none.

    Raises:
        RuntimeError: before `load_abi`.
    """

def ggml_version() -> str:
    """Return the version of the loaded ggml; RuntimeError before `load_abi`."""

# ---- sites

class Site(enum.Enum):
    """A place in a block: the block's output, or the contribution of its attention or MLP to it."""

    residual = 0
    attention = 1
    mlp = 2

class SiteNode:
    """The node of the probed graph that computes a site of a layer.

    Attributes:
        node: its name.
        backend: name of the buffer that holds its values.
        on_host: whether the host can read that buffer.
    """

    site: Site
    layer: int
    node: str
    backend: str
    on_host: bool

# ---- plan

class OperatorKind(enum.Enum):
    """The formulas of csrc/operators.hpp."""

    add = 0
    ablate = 1
    clamp = 2
    rotate = 3
    low_rank = 4

class Operator:
    """A change of a row of activations by directions; see `pysteer.pack.operators`."""

    def __init__(
        self,
        kind: OperatorKind,
        *,
        keep_norm: bool,
        one_sided: bool,
        target: bool,
        low: float,
        high: float,
        angle: float,
    ) -> None:
        """Arguments that the kind does not use are ignored; `angle` is in radians."""

    def apply(
        self, rows: npt.NDArray[np.float32], strength: float, h: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the activations h, (n, n_embd), after the operator; for tests.

        Args:
            rows: prepared directions, (rows, n_embd): unit rows for ablate and clamp, two
                orthonormal rows for rotate, the columns of U and then of V for low_rank.
        """

def has_usable_logits(logits: npt.NDArray[np.float32]) -> bool:
    """Return True if a token can be drawn: no logit is NaN or +infinity, and one is finite.

    -infinity is the logit of a token that cannot be drawn.

    Args:
        logits: any shape, not copied.
    """

class ScopeKind(enum.Enum):
    """The formulas of csrc/scope.hpp."""

    all = 0
    positions = 1
    response = 2
    linear = 3
    cosine = 4
    values = 5

class Scope:
    """The factor of the strength for each token of a sequence."""

    def __init__(
        self, kind: ScopeKind, start: int = 0, stop: int = 0, values: Iterable[float] = ()
    ) -> None:
        """Arguments that the kind does not use are ignored."""

    def factor(self, position: int, n_prompt: int) -> float:
        """Return the factor for a token of a sequence whose prompt has `n_prompt` tokens."""

class GateKind(enum.Enum):
    """The formulas of csrc/gate.hpp."""

    margin = 0
    multinomial = 1
    probe = 2
    centroid = 3
    cast = 4

class Gate:
    """A router's scores of its categories for a hidden state, in double precision. Immutable."""

    def __init__(
        self,
        site: Site,
        reads: Iterable[tuple[int, bool]],
        kind: GateKind,
        weights: npt.NDArray[np.float64],
        offsets: Iterable[float],
        origin: Iterable[float],
        allowances: Iterable[float],
    ) -> None:
        """Make a gate over the hidden state h, the concatenated reads.

        Args:
            reads: layers to read, each with True if averaged over a span of tokens.
            weights: (rows, reads x n_embd); margin and multinomial have a first row for
                prompts of no category, the others one row a category.
            offsets: (rows,) for the linear kinds; otherwise empty.
            origin: reads x n_embd values for centroid; otherwise empty.
            allowances: (categories,) for margin; otherwise empty.

        Raises:
            ValueError: the sizes do not fit each other.
        """

    def scores(self, h: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the score of each category, (categories,).

        Args:
            h: (reads x n_embd,).
        """

    def ranks(self, h: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the values that rank open gates, (categories,); for most kinds, the scores.

        Args:
            h: (reads x n_embd,).
        """

class Injection(enum.Enum):
    """Route of directions into a graph: automatic, llama.cpp's control vector, or the hook."""

    automatic = 0
    resident = 1
    hooked = 2

class ConflictRule(enum.Enum):
    """Choice among several gated terms that fire: all, the strongest, or the first."""

    sum = 0
    strongest = 1
    first = 2

class Term:
    """One category of a plan: an operator with its strength, scope and gate."""

    def __init__(
        self,
        *,
        operator: Operator,
        strength: float,
        scope: Scope,
        digest: int,
        exclude_bit: int = -1,
        rule: Iterable[int] = (),
        own_gate: int = -1,
    ) -> None:
        """Make a term.

        Args:
            digest: digest of the steering vector, below 2**64; part of `Sequence.keys`.
            exclude_bit: the term skips tokens whose mask has this bit; -1: skips no token.
            rule: when the term fires, in postfix: n >= 0 is gate n, -1 and, -2 or, -3 not;
                empty: always.
            own_gate: gate of the term's own category, which decides conflicts; -1: no gate.
        """

class Plan:
    """Operations at each site, layer and token. Immutable once sequences use the plan."""

    def __init__(self, n_layer: int, n_embd: int, injection: Injection) -> None: ...
    def add(
        self,
        site: Site,
        layers: npt.NDArray[np.int32],
        rows: npt.NDArray[np.float32],
        term: Term,
    ) -> None:
        """Append a term, which acts after those before it.

        Args:
            layers: (layers,).
            rows: prepared directions, (layers, rows, n_embd); kept, not copied.

        Raises:
            ValueError: a layer that the model lacks.
        """

    def set_gate(
        self,
        gate: Gate,
        thresholds: Iterable[float],
        above: Iterable[int],
        conflict: ConflictRule,
        recheck: int,
    ) -> None:
        """Set the gate that the rules of the terms refer to.

        Args:
            thresholds: one for each category of the gate.
            above: for each category, 1 if its gate opens at or above the threshold, 0 if at or
                below the threshold.
            recheck: number of response tokens between two decisions; 0: decide once.

        Raises:
            ValueError: sizes or rules that do not fit the gate or the plan.
        """

    def check_finite(self) -> None:
        """Check that the sum of all added directions is finite at every site and layer.

        Call this for every plan: a bound kept while terms are added makes the check free for all
        but extreme strengths.

        Raises:
            ValueError: a direction times its strength is not finite.
        """

    @property
    def fits_resident(self) -> bool:
        """True if llama.cpp's control vector can express the plan.

        Such a plan makes the same additions to the residual of layers >= 1 for every token.
        """

def shared_factors(
    gram: npt.NDArray[np.float64], factors: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return factors times the shares of csrc/shares.hpp, (n,); for tests.

    Args:
        gram: inner products of the changes at factor 1, (n, n); the lower triangle is read.
        factors: (n,).

    Raises:
        ValueError: shapes that do not fit.
    """

# ---- sequence

class Sequence:
    """A plan at work on one sequence: the decisions of its gate, and the factor of each token."""

    def __init__(
        self, plan: Plan, n_prompt: int, spans: Iterable[tuple[int, int]], n_positions: int
    ) -> None:
        """Start a sequence.

        Args:
            n_prompt: number of prompt tokens.
            spans: for each read of the gate, the prompt tokens [start, stop) to average over;
                ignored for reads of a single token, and for plans without a gate.
            n_positions: largest number of tokens in the sequence.

        Raises:
            ValueError: a wrong number of spans, or a span that is empty or outside the prompt.
        """

    def keys(self, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """Return fingerprints of the steering of the tokens [start, stop), (stop - start,).

        Fingerprints cover the steering that the KV cache depends on, so not the terms of the last
        block alone. Equal fingerprints mean equal steering; 0 means no steering.
        """

    def logits_key(self, position: int) -> int:
        """Return a fingerprint of the whole steering of one token."""

    @property
    def next_decision(self) -> int:
        """The position where the gate decides next; -1: never."""

    @property
    def wants_reprocess(self) -> bool:
        """True if a term fired that steers prompt tokens computed without the term."""

    @property
    def held(self) -> bool:
        """True if the first decision holds from the first token on."""

    def hold(self) -> None:
        """Make the first decision hold from the first token on, and forget later decisions."""

    def restart(self) -> None:
        """Forget the gate's reads since its last decision."""

    def undo_decision(self) -> None:
        """Take back the last decision, and the reads since; once for each decision.

        Raises:
            RuntimeError: there is no decision.
        """

    @property
    def n_decisions(self) -> int:
        """Number of decisions so far."""

    def leave_out(self, start: int, stop: int) -> None:
        """Have the gate read no prompt position of [start, stop); before the first decode."""

    def set_excluded(self, start: int, masks: npt.NDArray[np.uint32]) -> None:
        """Set the exclusion masks of tokens from `start` on, one for each token."""

    @property
    def decided_at(self) -> list[int]:
        """The positions of the decisions so far, ascending."""

    @property
    def scores(self) -> list[float]:
        """The scores of the last decision, one for each category; empty without a gate."""

    @property
    def ranks(self) -> list[float]:
        """The ranks of the last decision, one for each category; empty without a gate."""

    def fired(self, decision: int, term: int) -> bool:
        """Return True if a term of the plan fired at a decision; both count from 0."""

    @overload
    def tokens_steered(self, n_tokens: int) -> int:
        """Return how many of the first `n_tokens` tokens any term acts on."""

    @overload
    def tokens_steered(self, term: int, n_tokens: int) -> int:
        """Return how many of the first `n_tokens` tokens a term acts on."""

# ---- hook

class Capture:
    """Means of activations, summed during decodes."""

    def read(self, site: Site, layer: int) -> npt.NDArray[np.float32]:
        """Return the means of each slot, (n_slots, n_embd).

        Raises:
            RuntimeError: the place or some of its tokens were not captured.
        """

class Hook:
    """The eval callback of one llama_context, and its account of each decode.

    For one thread at a time. Detach the hook before the context is freed, and keep the hook alive
    until then.
    """

    def __init__(self) -> None: ...
    @property
    def address(self) -> int:
        """The value for `llama_context_params.cb_eval_user_data`."""

    def begin_probe(self, n_layer: int, n_embd: int, n_tokens: int) -> None:
        """Start looking for the sites in the next decode, of `n_tokens` tokens.

        Meanwhile the control vector of layer N must hold the value N in all its elements.
        """

    def end_probe(self) -> None:
        """Learn the sites, and zero the control vectors; RuntimeError if the probe failed."""

    @property
    def sites(self) -> list[SiteNode]:
        """The sites of the model; RuntimeError before a probe."""

    def set_sequence(self, slot: int, sequence: Sequence | None) -> None:
        """Steer the sequence with llama.cpp's number `slot` from the next decode on; None: stop.

        Raises:
            ValueError: the plan is for another shape of model, or for a site that the model lacks;
                the former sequence stays in force.
            RuntimeError: a decode is running, or after `detach`.
        """

    def next_decision(self, slot: int) -> int:
        """Return the position where the gate of a sequence decides next; -1: never.

        That token must be the last of its decode.
        """

    def begin_decode(self, runs: npt.NDArray[np.int32]) -> None:
        """Announce the rows of one or several llama_decode calls, in their order.

        Args:
            runs: (n, 4): slot, position of the first token, number of tokens, and wanted logits: 0
                of no token, 1 of the last token, 2 of every token.

        Raises:
            ValueError: a plan insists on the control vector, which cannot express it; or tokens
                beyond the gate's next decision.
            RuntimeError: a decode is running, or after `detach`.
        """

    def end_decode(self) -> None:
        """End the decode, and check that steering reached every token.

        Raises:
            RuntimeError: steering missed a token, or the callback met an unsupported node.
        """

    def begin_foreign(self, slot: int, position: int, n_rows: int, n_positions: int) -> None:
        """Announce llama_decode calls of a foreign caller: at most `n_rows` rows without logits.

        The rows stand at the positions of a prompt from `position` on; rows beyond the first
        `n_positions` share the last position. No gate reads them. Raises as `begin_decode`.
        """

    def end_foreign(self) -> int:
        """End the foreign decodes, and return the number of rows; 0 for models of one block.

        Raises as `end_decode`, and for more rows than announced.
        """

    @property
    def cuts(self) -> int:
        """Number of nodes after which the last decode cut the graph."""

    @property
    def was_resident(self) -> bool:
        """True if the last decode was steered through llama.cpp's control vector."""

    def abandon_decode(self) -> None:
        """End a decode that failed, without checks."""

    def begin_capture(
        self,
        *,
        wanted: npt.NDArray[np.uint8],
        slots: npt.NDArray[np.int32],
        n_slots: int,
        n_layer: int,
        n_embd: int,
    ) -> None:
        """Capture the activations of the next decodes, up to `end_capture`.

        Where nothing is steered, graphs end with the last wanted place, and logits are undefined.

        Args:
            wanted: (sites x n_layer,) flags, site by site in the order of `Site`.
            slots: for each token of the decodes, the number of its mean; -1: no mean.
            n_slots: number of means; each needs at least one token.

        Raises:
            ValueError: sizes or slots that do not fit, or a place that the model lacks.
            RuntimeError: a decode is running, or after `detach`.
        """

    def end_capture(self) -> Capture:
        """Return the means captured since `begin_capture`."""

    def detach(self) -> None:
        """Touch no tensor any more: the context is about to be freed."""
