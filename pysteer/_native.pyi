import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

callback_address: int

class NotOnHost(NotImplementedError): ...

class Site(enum.Enum):
    residual = 0
    attention = 1

class Pooling(enum.Enum):
    last = 0
    mean = 1
    all = 2

class FoundSite:
    site: Site
    layer: int
    node: str
    backend: str
    on_host: bool

class Plan:
    def __init__(self, n_layer: int, n_embd: int) -> None: ...
    def add(
        self,
        site: Site,
        layers: npt.NDArray[np.int32],
        directions: npt.NDArray[np.float32],
        strength: float,
    ) -> None: ...
    @property
    def fits_resident(self) -> bool: ...
    @property
    def empty(self) -> bool: ...

class Capture:
    def read(self, site: Site, layer: int) -> npt.NDArray[np.float32]: ...

class Hook:
    def __init__(self) -> None: ...
    @property
    def address(self) -> int: ...
    def begin_probe(self, n_layer: int, n_embd: int) -> None: ...
    def end_probe(self) -> None: ...
    @property
    def sites(self) -> list[FoundSite]: ...
    def set_plan(self, plan: Plan | None, resident: bool) -> None: ...
    def begin_decode(self) -> None: ...
    def end_decode(self, tokens_decoded: int) -> None: ...
    def abandon_decode(self) -> None: ...
    def begin_capture(
        self,
        *,
        wanted: Sequence[int],
        pooling: Pooling,
        n_layer: int,
        n_embd: int,
        n_tokens: int,
        start: int,
        stop: int,
    ) -> None: ...
    def end_capture(self) -> Capture: ...
    def detach(self) -> None: ...

def load_abi(library_handle: int, library_folder: str) -> None: ...
def ggml_version() -> str: ...
