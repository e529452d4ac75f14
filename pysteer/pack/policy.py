"""`Policy`: the categories that act, when and how strongly, as data of a pack or a YAML file.

`pysteer.pack.resolved.ResolvedPolicy` is a pack under a policy; the runtime compiles it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError

from pysteer.errors import SteeringError, quoted
from pysteer.pack.policy_error import Places, PolicyError, PolicyPath, located
from pysteer.pack.rules import Rule
from pysteer.pack.scope import MAX_POSITION, Scope, is_finite, is_text

if TYPE_CHECKING:
    import os

GateKind: TypeAlias = Literal["margin", "multinomial", "probe", "centroid", "cast"]
ConflictRule: TypeAlias = Literal["sum", "strongest", "first"]
CategoryMode: TypeAlias = Literal["auto", "always", "off"]

_SHOWN_NAMES = 200  # characters of a list of names in a message
_BOUNDS = {"multinomial": (0.0, 1.0), "centroid": (-1.0, 1.0), "cast": (-1.0, 1.0)}
"""Kind of gate to its smallest and largest possible score; other kinds have no bounds."""

_T = TypeVar("_T")
_S = TypeVar("_S", bound="_Settings")


def _nullable(read: Callable[[object], _T]) -> PlainValidator:
    return PlainValidator(lambda value: None if value is None else read(value))


def _number(value: Any) -> float:
    if not is_finite(value):
        raise SteeringError(f"must be a finite number, not {quoted(value)}")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_POSITION:
        raise SteeringError(
            f"must be a number of tokens from 1 to {MAX_POSITION}, not {quoted(value)}"
        )
    return value


def _rule(value: Any) -> Rule:
    return value if isinstance(value, Rule) else Rule(value)


class _Settings(BaseModel):
    """Strict, immutable settings that remember the fields that were given."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    def __init__(self, /, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _first(error, type(self)) from None

    @classmethod
    def from_content(cls: type[_S], given: object) -> _S:
        """Return the settings of a mapping from anywhere, such as from `content()`.

        Raises:
            PolicyError: not a mapping, or a mapping with wrong keys or values.
        """
        if not isinstance(given, Mapping):
            raise PolicyError(
                (), f"must be a mapping with keys such as {_keys(cls)}, not {quoted(given)}"
            )
        for key in given:
            if not isinstance(key, str):
                raise PolicyError((), f"the key {quoted(key)} is not text")
        return cls(**given)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        # Which fields were given takes part: it decides when one policy is laid over another.
        return self._given() == other._given()

    def __hash__(self) -> int:
        return hash(frozenset(self._given().items()))

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        return self.__copy__()  # all of it is immutable


class CategoryPolicy(_Settings):
    """The part of a policy about one category. None (null in a file) equals a missing setting.

    Attributes:
        mode: for requests without `steering`: "auto" (gated), "always" (forced) or "off". None:
            gated if the router can decide the category's rule, else off.
        strength: factor of the directions; 1.0 is the strength that the pack recommends.
        threshold: threshold of this category's gate in all rules, in the unit of the gate's score.
            None: the router's own.
        scope: the tokens that are steered, as a `Scope` or anything that `Scope.parse` takes. None:
            the policy's.
        when: the rule of the category if gated, as a `Rule` or its text. None: the category's own
            gate.

    Raises:
        SteeringError: an unknown key or an invalid value.
    """

    mode: CategoryMode | None = None
    strength: Annotated[float, PlainValidator(_number)] = 1.0
    threshold: Annotated[float | None, _nullable(_number)] = None
    scope: Annotated[Scope | None, _nullable(Scope.parse)] = None
    when: Annotated[Rule | None, _nullable(_rule)] = None

    def content(self) -> dict[str, Any]:
        """Return the settings that were given as JSON data, in the order of the fields."""
        given = self._given()
        found = {name: given[name] for name in type(self).model_fields if name in given}
        if self.scope is not None:
            found["scope"] = self.scope.content()
        if self.when is not None:
            found["when"] = self.when.text
        return found


def _categories(value: Any) -> Mapping[str, CategoryPolicy]:
    if not isinstance(value, Mapping):
        raise SteeringError(f"must be a mapping of categories, not {quoted(value)}")
    found = {}
    for name, settings in value.items():
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            raise SteeringError(f"{quoted(name)} is not a category name")
        if not isinstance(settings, CategoryPolicy):
            try:
                settings = CategoryPolicy.from_content(settings)
            except PolicyError as error:
                raise PolicyError((name, *error.path), error.reason) from None
        found[name] = settings
    return MappingProxyType(found)


@dataclass(frozen=True)
class CategorySettings:
    """The settings of one category with all defaults in place.

    Attributes:
        mode: "auto", "always" or "off".
        strength: finite.
        threshold: of its gate, or None for the router's own.
        scope: the tokens that are steered.
        rule: the condition under which the category acts where it is gated.
    """

    mode: CategoryMode
    strength: float
    threshold: float | None
    scope: Scope
    rule: Rule


class Policy(_Settings):
    """Rules for the categories that act, their conditions and strengths.

    Immutable; equal to another policy that was given the same settings.

    Attributes:
        gate: the kind of gate that decides; one of `pysteer.pack.router.GATES`. None: "margin" if
            the router has it, else "multinomial".
        conflict: the choice among several fired categories: "strongest" (the score furthest past
            its threshold), "first" (in the pack's order) or "sum" (all; those that are alike share
            their strength).
        recheck: decide again after every so many response tokens. None: decide once, at the last
            prompt token.
        scope: of the categories that have no scope of their own in this policy or one laid over it.
        categories: category to `CategoryPolicy`, or to a mapping of its fields. Other categories
            have their defaults.

    Raises:
        SteeringError: an unknown key, an invalid value, or a threshold that no score of this kind
            of gate can cross.

    Examples:
        >>> from pysteer import Policy
        >>> policy = Policy(gate="margin", categories={"malware": {"scope": "first 8"}})
        >>> gentler = policy.merged(Policy(categories={"malware": {"strength": 0.5}}))
        >>> gentler.content()
        {'gate': 'margin', 'categories': {'malware': {'strength': 0.5, 'scope': 'first 8'}}}
        >>> Policy(conflict="loudest")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        PolicyError: conflict: must be 'sum', 'strongest' or 'first', not 'loudest'
    """

    gate: GateKind | None = None
    conflict: ConflictRule = "strongest"
    recheck: Annotated[int | None, _nullable(_count)] = None
    scope: Annotated[Scope, PlainValidator(Scope.parse)] = Scope()
    categories: Annotated[Mapping[str, CategoryPolicy], PlainValidator(_categories)] = Field(
        default_factory=lambda: MappingProxyType({})
    )
    _places: Places = PrivateAttr(default_factory=dict)

    def __init__(self, /, **given: Any) -> None:
        super().__init__(**given)
        if self.gate is not None:  # else a policy below this one may name the gate
            self._check_thresholds(self.gate)

    def _check_thresholds(self, kind: GateKind) -> None:
        if kind not in _BOUNDS:
            return
        smallest, largest = _BOUNDS[kind]
        for name, settings in self.categories.items():
            threshold = settings.threshold
            if threshold is not None and not smallest <= threshold <= largest:
                self._refuse(
                    ("categories", name, "threshold"),
                    f"{threshold} cannot be crossed: scores of the gate {kind!r} are between "
                    f"{smallest:g} and {largest:g}",
                )

    def __hash__(self) -> int:
        return hash((self.gate, self.conflict, self.recheck, frozenset(self.categories.items())))

    def __reduce__(self) -> tuple[Callable[..., Policy], tuple[object, ...]]:
        # The read-only view of the categories cannot be pickled.
        return _placed, (self.content(), dict(self._places))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy from a YAML or JSON file. `check` then compares it with a pack.

        YAML is read as in version 1.2 (`off` is text), without anchors, aliases and tags.

        Raises:
            FormatError: the file is not a policy; names the file, the line and the setting.
        """
        from pysteer.pack import policy_file  # with YAML, which most packs are used without

        return _placed(*policy_file.read(Path(path)))

    def content(self) -> dict[str, Any]:
        """Return the settings that were given as JSON data, which `from_content` reads."""
        given = self._given()
        found = {name: given[name] for name in type(self).model_fields if name in given}
        if "scope" in found:
            found["scope"] = self.scope.content()
        if "categories" in found:
            found["categories"] = {
                name: settings.content() for name, settings in self.categories.items()
            }
        return found

    def merged(self, other: Policy, kinds: Collection[str] = ()) -> Policy:
        """Return this policy with the settings of `other` laid over it, also within categories.

        A setting of `other` replaces the same setting here, and what depends on it: `scope` of
        `other` also replaces the scopes of categories here, and `gate` of `other`, where it is
        another kind, the thresholds here, which are in the unit of the kind before.

        Args:
            other: the policy of whoever decides over this one: the operator's over the pack's, a
                request's over the operator's.
            kinds: the kinds of gate that the pack's router has, which tell the kind of a policy
                that names none. Without kinds, such a policy keeps its thresholds.

        Raises:
            SteeringError: the two policies contradict each other.
        """
        mine, theirs = self.content(), other.content()
        replaced = self._replaced_by(other, kinds)
        categories = {
            name: {key: value for key, value in settings.items() if key not in replaced}
            for name, settings in mine.get("categories", {}).items()
        }
        for name, settings in theirs.get("categories", {}).items():
            categories[name] = {**categories.get(name, {}), **settings}
        content = {**mine, **theirs}
        if categories:
            content["categories"] = categories
        return _placed(content, {**self._all_places(), **other._all_places()})

    def _replaced_by(self, other: Policy, kinds: Collection[str]) -> set[str]:
        """Return the categories' keys here that top-level settings of `other` replace."""
        given = other.model_fields_set
        mine = self.gate or _default_gate(kinds)
        other_kind = "gate" in given and mine not in (None, other.gate or _default_gate(kinds))
        return {
            *({"scope"} if "scope" in given else ()),
            *({"threshold"} if other_kind else ()),
        }

    def settings(self, category: str, known: Collection[str] | None = None) -> CategorySettings:
        """Return the settings of a category, mentioned or not, with all defaults in place.

        Args:
            category: its name.
            known: the categories that the router has gates for; None: every category.
        """
        given = self.categories.get(category, _DEFAULT)
        rule = given.when if given.when is not None else Rule.of_category(category)
        mode = given.mode
        if mode is None:
            mode = "auto" if known is None or set(rule.names) <= set(known) else "off"
        return CategorySettings(
            mode=mode,
            strength=given.strength,
            threshold=given.threshold,
            scope=given.scope if given.scope is not None else self.scope,
            rule=rule,
        )

    def gate_kind(self, kinds: Collection[str]) -> GateKind:
        """Return the kind of gate that decides.

        Args:
            kinds: the kinds of gate that a router has.

        Raises:
            SteeringError: the policy asks for a kind that the router does not have. A FormatError
                with file and line if the setting was read from a file.
        """
        if self.gate is None:
            return _default_gate(kinds) or "multinomial"
        if self.gate not in kinds:
            self._refuse(
                ("gate",), f"the pack's router has no {self.gate} gate; it has {_listed(kinds)}"
            )
        return self.gate

    def check(
        self, *, categories: Collection[str], known: Collection[str], kinds: Collection[str]
    ) -> None:
        """Check that the policy fits a pack.

        Args:
            categories: the categories of the pack.
            known: the categories that the pack's router has gates for; empty without a router.
            kinds: the kinds of gate that the router has; empty without a router.

        Raises:
            SteeringError: the policy names a category that the pack does not hold, relies on a gate
                that the router does not have, or has a threshold that no score can cross. A
                FormatError with file and line if the setting was read from a file.
        """
        for name, settings in self.categories.items():
            self._check_category(("categories", name), name, categories)
            if settings.when is not None:
                path = ("categories", name, "when")
                for named in settings.when.names:
                    self._check_category(path, named, categories)
                    self._check_gate(path, named, known)
                if self.conflict == "strongest":
                    self._check_gate(path, name, known, ", to be compared by 'strongest'")
            elif settings.mode == "auto":
                path = ("categories", name, "mode")
                self._check_gate(path, name, known, "; use always, off, or a rule `when`")
            if settings.threshold is not None:
                self._check_gate(("categories", name, "threshold"), name, known)
        if kinds:
            self._check_thresholds(self.gate_kind(kinds))

    def _check_category(self, path: PolicyPath, name: str, categories: Collection[str]) -> None:
        if name not in categories:
            self._refuse(
                path, f"unknown category {quoted(name)}; this pack has {_listed(categories)}"
            )

    def _check_gate(
        self, path: PolicyPath, name: str, known: Collection[str], way_out: str = ""
    ) -> None:
        if name not in known:
            there = f"its router knows {_listed(known)}" if known else "it has no router"
            self._refuse(path, f"the pack has no gate for {quoted(name)} ({there}){way_out}")

    def _refuse(self, path: PolicyPath, reason: str) -> NoReturn:
        raise located(PolicyError(path, reason), self._places)

    def _all_places(self) -> dict[PolicyPath, str | None]:
        """Return the places of all settings, None for those that were not read from a file."""
        content = self.content()
        places: dict[PolicyPath, str | None] = {(name,): None for name in content}
        for name, settings in content.get("categories", {}).items():
            places["categories", name] = None
            places.update({("categories", name, key): None for key in settings})
        return {**places, **self._places}


_DEFAULT = CategoryPolicy()


def _default_gate(kinds: Collection[str]) -> GateKind | None:
    """Return the kind that decides where no policy names one; None: the router is unknown."""
    return "margin" if "margin" in kinds else "multinomial" if kinds else None


def _placed(content: object, places: Places) -> Policy:
    """Return the policy of some content, and remember the places that it was read from."""
    try:
        policy = Policy.from_content(content)
    except PolicyError as error:
        raise located(error, places) from None
    policy._places = places
    return policy


def _first(error: ValidationError, model: type[BaseModel]) -> PolicyError:
    """Return the first of pydantic's errors as a PolicyError."""
    found = error.errors(include_url=False)[0]
    path = tuple(str(part) for part in found["loc"])
    context = found.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, PolicyError):
        return PolicyError((*path, *cause.path), cause.reason)
    if found["type"] == "value_error":
        return PolicyError(path, str(cause))
    if found["type"] == "extra_forbidden":
        return PolicyError(path, f"unknown key; there are {_keys(model)}")
    return PolicyError(path, f"must be {context['expected']}, not {quoted(found['input'])}")


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _listed(names: Collection[str]) -> str:
    text = ", ".join(name if name.isprintable() else quoted(name) for name in names)
    return text if len(text) <= _SHOWN_NAMES else text[: _SHOWN_NAMES - 3] + "..."
