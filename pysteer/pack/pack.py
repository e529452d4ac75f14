"""`SteeringPack`: the steering vectors of several categories for one base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from pysteer.category import check_category
from pysteer.errors import (
    ModelMismatchError,
    SteeringError,
    UnknownCategoryError,
    naming,
    nearest,
    quoted,
)
from pysteer.formats import gguf, registry
from pysteer.pack.operators import Operator
from pysteer.pack.router import Router
from pysteer.pack.vector import MAX_LAYER, SteeringVector, finite

if TYPE_CHECKING:
    import os

    from pysteer.pack.policy import Policy


_MAX_COUNT = 2**32 - 1
_MAX_DEPTH = 16  # of the provenance: ample, and far from the limits of JSON readers


@dataclass(frozen=True)
class BaseModel:
    """Identity of the model that a pack was made for. Quantisation does not change it.

    Attributes:
        architecture: `general.architecture` of the GGUF, such as "llama".
        name: `general.name` of the GGUF; may be empty. Ignored by `check_fits`, because fine-tunes
            share a base.
        n_layer: number of blocks.
        n_embd: width of the residual stream.
        n_vocab: number of tokens.

    Raises:
        SteeringError: a text that is not Unicode, or a size that is not a 32-bit count.
    """

    architecture: str
    name: str
    n_layer: int
    n_embd: int
    n_vocab: int

    def __post_init__(self) -> None:
        _check_text(self.architecture, "the architecture")
        _check_text(self.name, "the base model's name")
        for what in ("n_layer", "n_embd", "n_vocab"):
            size = getattr(self, what)
            smallest = 0 if what == "n_vocab" else 1  # a model may come without a vocabulary
            if type(size) is not int or not smallest <= size <= _MAX_COUNT:
                raise SteeringError(f"{what} of the base model is {quoted(size)}")

    def difference(self, other: BaseModel) -> tuple[str, object, object] | None:
        """Return the first field besides the name in which two models differ, with both values."""
        for what in ("architecture", "n_layer", "n_embd", "n_vocab"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                return what, ours, theirs
        return None


@dataclass(frozen=True)
class SteeringPack:
    """Named categories over one base model.

    Attributes:
        categories: category to steering vector; any names. Strength 1.0 is the strength
            recommended for that category.
        base_model: the model that the pack fits, or None if unknown, as for a plain control-vector
            file.
        residual_norm: layer to typical (median) L2 norm of the residual stream there, in the units
            of the model's activations, as measured when the pack was made. May be empty.
        provenance: origin of the pack: method, parameters, data, versions. JSON data (text, finite
            numbers, True, False, None, lists, and mappings with text as keys) at most 16 deep; a
            read-only copy of the argument.
        router: recognises categories in a prompt's hidden state, or None. A router may know fewer
            categories than the pack has.
        policy: decides the categories that act on requests without their own steering, or None.

    Raises:
        SteeringError: no categories, or vectors, a router or a policy that do not fit each other or
            the base model.

    Examples:
        >>> import numpy as np
        >>> from pysteer import SteeringPack, SteeringVector
        >>> pack = SteeringPack({"malware": SteeringVector({8: np.ones(4)})})
        >>> pack["malware"].layers
        (8,)
        >>> pack.save("pack.gguf")
        >>> SteeringPack.load("pack.gguf") == pack
        True
        >>> pack["fraud"]  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        UnknownCategoryError: unknown category 'fraud'; this pack has malware
    """

    categories: Mapping[str, SteeringVector]
    base_model: BaseModel | None = None
    residual_norm: Mapping[int, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    router: Router | None = None
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if not self.categories:
            raise SteeringError("a pack needs at least one category")
        for name in self.categories:
            check_category(name)
        widths = {name: vector.n_embd for name, vector in self.categories.items()}
        if len(set(widths.values())) > 1:
            raise SteeringError(f"the categories differ in width: {widths}")
        self._check_router()
        self._check_policy()
        if self.base_model is not None:
            self._check_shape(self.base_model)
        self._check_residual_norm()
        if not isinstance(self.provenance, Mapping):
            raise SteeringError(f"the provenance is {quoted(self.provenance)}, not a mapping")
        object.__setattr__(self, "provenance", _frozen(self.provenance, "the provenance"))
        for name in ("categories", "residual_norm", "provenance"):  # read-only from here on
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def _check_residual_norm(self) -> None:
        for layer, norm in self.residual_norm.items():
            if type(layer) is not int or not 0 <= layer <= MAX_LAYER:
                raise SteeringError(f"a residual norm is given for the layer {quoted(layer)}")
            what = f"the residual norm of layer {layer}"
            if not isinstance(norm, Real) or finite(norm, f"{what} must be") < 0:
                raise SteeringError(f"{what} is {quoted(norm)}")

    def _check_router(self) -> None:
        router = self.router
        if router is None:
            return
        if not isinstance(router, Router):
            raise SteeringError(f"{quoted(router)} is not a router")
        if router.n_embd != self.n_embd:
            raise SteeringError(
                f"the router reads hidden states of width {router.n_embd}, "
                f"the directions have width {self.n_embd}"
            )
        unknown = [name for name in router.categories if name not in self.categories]
        if unknown:
            raise SteeringError(f"the router knows {quoted(unknown)}, which the pack lacks")

    def _check_policy(self) -> None:
        if self.policy is None:
            return
        if not isinstance(self.policy, _policy_class()):
            raise SteeringError(f"{quoted(self.policy)} is not a pysteer.pack.policy.Policy")
        self.check_policy(self.policy)

    def __getitem__(self, category: str) -> SteeringVector:
        try:
            return self.categories[category]
        except KeyError:
            raise UnknownCategoryError(
                f"unknown category {quoted(category)}; this pack has {', '.join(self.categories)}"
                + nearest(category, self.categories)
            ) from None

    def __reduce__(self) -> tuple[type[SteeringPack], tuple[object, ...]]:
        # The read-only views cannot be pickled.
        return SteeringPack, (
            dict(self.categories),
            self.base_model,
            dict(self.residual_norm),
            dict(self.provenance),
            self.router,
            self.policy,
        )

    @property
    def n_embd(self) -> int:
        """Width of every direction in the pack."""
        return next(iter(self.categories.values())).n_embd

    def check_policy(self, policy: Policy) -> None:
        """Check that a policy fits the categories and the router; see `Policy.check`.

        Raises:
            SteeringError: the policy does not fit.
        """
        router = self.router
        policy.check(
            categories=list(self.categories),
            known=list(router.categories) if router is not None else [],
            kinds=list(router.gates) if router is not None else [],
        )

    def check_fits(self, model: BaseModel) -> None:
        """Raise ModelMismatchError unless the pack can steer `model`."""
        made_for = self.base_model
        if made_for is not None and (difference := made_for.difference(model)):
            what, ours, theirs = difference
            raise ModelMismatchError(
                f"the pack was made for {made_for.name or 'a model'} with {what} {ours}, "
                f"this model has {what} {theirs}; build a pack for this model"
            )
        self._check_shape(model)

    def _check_shape(self, model: BaseModel) -> None:
        for category, vector in self.categories.items():
            if vector.n_embd != model.n_embd:
                raise ModelMismatchError(
                    f"category {category!r} has directions of width {vector.n_embd}, "
                    f"the model has n_embd {model.n_embd}"
                )
            if vector.layers[-1] >= model.n_layer:
                raise ModelMismatchError(
                    f"category {category!r} has a direction for layer {vector.layers[-1]}, "
                    f"the model has layers 0 to {model.n_layer - 1}"
                )
        if self.router is not None and self.router.last_layer >= model.n_layer:
            raise ModelMismatchError(
                f"the router reads layer {self.router.last_layer}, "
                f"the model has layers 0 to {model.n_layer - 1}"
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the pack to one GGUF file; an older file is replaced in one step.

        Args:
            path: the file; its name ends in .gguf.
            overwrite: replace any older file; otherwise packs, and control vectors by pysteer.

        Raises:
            SteeringError: the file cannot be written.
        """
        from pysteer.formats import gguf_writer  # with the gguf package, and so with YAML

        content = gguf.PackContent(
            categories={
                name: gguf.CategoryContent(
                    vector.site, dict(vector.items()), vector.operator.content()
                )
                for name, vector in self.categories.items()
            },
            base_model=asdict(self.base_model) if self.base_model is not None else None,
            residual_norm=dict(self.residual_norm),
            provenance=dict(self.provenance),
            router=self.router.content() if self.router is not None else None,
            policy=self.policy.content() if self.policy is not None else None,
        )
        gguf_writer.write_pack(Path(path), content, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringPack:
        """Read a pack, or a plain control-vector file as a pack of one category named by its stem.

        Raises:
            FormatError: the file is damaged, or neither of the two.
        """
        path = Path(path)
        content = registry.read_pack(path)
        with naming(path):
            model, router = content.base_model, content.router
            policy = None
            if content.policy is not None:
                policy = _policy_class().from_content(content.policy)
            return cls(
                {
                    name: SteeringVector(
                        category.directions,
                        site=category.site,
                        operator=Operator.from_content(category.operator),
                    )
                    for name, category in content.categories.items()
                },
                base_model=BaseModel(**model) if model is not None else None,  # type: ignore[arg-type]
                residual_norm=content.residual_norm,
                provenance=content.provenance,
                router=Router.from_content(router) if router is not None else None,
                policy=policy,
            )


def _policy_class() -> type[Policy]:
    """Return `Policy`; the import loads pydantic, which is slow and which few packs need."""
    from pysteer.pack.policy import Policy

    return Policy


def _check_text(value: object, what: str) -> None:
    try:
        if isinstance(value, str):
            value.encode("utf-8")
            return
    except UnicodeEncodeError:
        pass
    raise SteeringError(f"{what} is {quoted(value)}, which is not text")


def _refuse(self: object, *_: object, **__: object) -> NoReturn:
    raise TypeError("a pack is read-only; build another pack")


class _FrozenDict(dict[str, Any]):
    """A mapping that compares, prints and turns into JSON as a dict does, and never changes."""

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _FrozenDict, (dict(self),)


class _FrozenList(list[Any]):
    """A list that compares, prints and turns into JSON as a list does, and never changes."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = _refuse
    pop = remove = reverse = sort = _refuse

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _FrozenList, (list(self),)


def _frozen(value: object, what: str, depth: int = 0) -> Any:
    """Return a read-only copy of JSON data; SteeringError names the part that is not JSON."""
    if depth > _MAX_DEPTH:
        raise SteeringError(f"{what} is more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        _check_text(value, what)
        return value
    if isinstance(value, float):
        return finite(value, f"{what} must be")
    if isinstance(value, Mapping):
        for key in value:
            _check_text(key, f"a key of {what}")
        return _FrozenDict(
            {key: _frozen(part, _part(what, key), depth + 1) for key, part in value.items()}
        )
    if isinstance(value, (list, tuple)):
        return _FrozenList(_frozen(part, _part(what, i), depth + 1) for i, part in enumerate(value))
    raise SteeringError(
        f"{what} is {quoted(value)}, not JSON data; give text, numbers, lists or mappings"
    )


def _part(what: str, key: object) -> str:
    # Hostile keys may be long, with one key for each level.
    return what if len(what) > 200 else f"{what}[{quoted(key)}]"
