"""The extraction methods, by name: one module a family, one line a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pysteer.extract.methods.base import Method
from pysteer.extract.methods.contrast import Contrast
from pysteer.extract.methods.guided import Guided
from pysteer.extract.methods.learned import Learned
from pysteer.extract.methods.linear import Lda, Logistic
from pysteer.extract.methods.means import Mean, Pruned
from pysteer.extract.methods.pca import Pca

METHODS: Mapping[str, Method[Any]] = {
    method.name: method
    for method in (
        Mean(),
        Pruned(),
        Guided(),
        Pca(),
        Logistic(),
        Lda(),
        Contrast(),
        Learned(),
    )
}
"""Name to method, in the order of help texts."""
