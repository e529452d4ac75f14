import enum
from collections.abc import Iterable
from typing import overload

import numpy as np
import numpy.typing as npt

callback_address: int

class NotOnHost(NotImplementedError): ...

class Site(enum.Enum):
    residual = 0
    attention = 1
    mlp = 2

class SiteNode:
    site: Site
    layer: int
    node: str
    backend: str
    on_host: bool

class Injection(enum.Enum):
    automatic = 0
    resident = 1
    hooked = 2

class ConflictRule(enum.Enum):
    sum = 0
    strongest = 1
    first = 2

class OperatorKind(enum.Enum):
    add = 0
    ablate = 1
    clamp = 2
    rotate = 3
    low_rank = 4

class Operator:
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
    ) -> None: ...
    def apply(
        self, rows: npt.NDArray[np.float32], strength: float, h: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]: ...

class ScopeKind(enum.Enum):
    all = 0
    positions = 1
    response = 2
    linear = 3
    cosine = 4
    values = 5

class Scope:
    def __init__(
        self, kind: ScopeKind, start: int = 0, stop: int = 0, values: Iterable[float] = ()
    ) -> None: ...
    def factor(self, position: int, n_prompt: int) -> float: ...

class GateKind(enum.Enum):
    margin = 0
    multinomial = 1
    probe = 2
    centroid = 3
    cast = 4

class Gate:
    def __init__(
        self,
        site: Site,
        reads: Iterable[tuple[int, bool]],
        kind: GateKind,
        weights: npt.NDArray[np.float64],
        offsets: Iterable[float],
        origin: Iterable[float],
        allowances: Iterable[float],
    ) -> None: ...
    def scores(self, h: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
    def ranks(self, h: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...

class Plan:
    def __init__(self, n_layer: int, n_embd: int, injection: Injection) -> None: ...
    def add(
        self,
        site: Site,
        layers: npt.NDArray[np.int32],
        rows: npt.NDArray[np.float32],
        operator: Operator,
        strength: float,
        scope: Scope,
        digest: int,
        exclude_bit: int,
        rule: Iterable[int],
        own_gate: int,
    ) -> None: ...
    def set_gate(
        self,
        gate: Gate,
        thresholds: Iterable[float],
        above: Iterable[int],
        conflict: ConflictRule,
        recheck: int,
    ) -> None: ...
    def check_finite(self) -> None:
        """Check that what the terms together add is finite at every layer and site.

        Call it for every plan: a bound kept while terms are added makes it free for all but
        extreme strengths.

        Raises:
            ValueError: a direction times its strength is not finite.
        """
    @property
    def fits_resident(self) -> bool: ...

class Sequence:
    def __init__(
        self, plan: Plan, n_prompt: int, spans: Iterable[tuple[int, int]], n_positions: int
    ) -> None: ...
    def keys(self, start: int, stop: int) -> npt.NDArray[np.uint64]: ...
    def logits_key(self, position: int) -> int: ...
    @property
    def next_decision(self) -> int: ...
    @property
    def wants_reprocess(self) -> bool: ...
    @property
    def held(self) -> bool: ...
    def hold(self) -> None: ...
    def restart(self) -> None: ...
    def set_excluded(self, start: int, masks: npt.NDArray[np.uint32]) -> None: ...
    @property
    def decided_at(self) -> list[int]: ...
    @property
    def scores(self) -> list[float]: ...
    @property
    def ranks(self) -> list[float]: ...
    def fired(self, decision: int, term: int) -> bool: ...
    @overload
    def tokens_steered(self, n_tokens: int) -> int: ...
    @overload
    def tokens_steered(self, term: int, n_tokens: int) -> int: ...

class Capture:
    def read(self, site: Site, layer: int) -> npt.NDArray[np.float32]: ...

class Hook:
    def __init__(self) -> None: ...
    @property
    def address(self) -> int: ...
    def begin_probe(self, n_layer: int, n_embd: int) -> None: ...
    def end_probe(self) -> None: ...
    @property
    def sites(self) -> list[SiteNode]: ...
    def set_sequence(self, slot: int, sequence: Sequence | None) -> None: ...
    def next_decision(self, slot: int) -> int: ...
    def begin_decode(self, runs: npt.NDArray[np.int32]) -> None: ...
    def end_decode(self) -> None: ...
    @property
    def was_resident(self) -> bool: ...
    def abandon_decode(self) -> None: ...
    def begin_capture(
        self,
        *,
        wanted: npt.NDArray[np.uint8],
        slots: npt.NDArray[np.int32],
        n_slots: int,
        n_layer: int,
        n_embd: int,
    ) -> None: ...
    def end_capture(self) -> Capture: ...
    def detach(self) -> None: ...

def load_abi(library_handle: int, library_folder: str) -> None: ...
def ggml_version() -> str: ...
