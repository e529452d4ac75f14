"""`Policy`: what acts when, as data that a pack or a YAML file carries.

`SteeringPack` holds it against its categories and its router; the runtime compiles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError

from pysteer.errors import FormatError, SteeringError, naming, quoted
from pysteer.pack.rules import Rule
from pysteer.pack.scope import MAX_POSITION, Scope, is_finite, is_text

if TYPE_CHECKING:
    import os

GateKind: TypeAlias = Literal["margin", "multinomial", "probe", "centroid", "cast"]
ConflictRule: TypeAlias = Literal["sum", "strongest", "first"]
CategoryMode: TypeAlias = Literal["auto", "always", "off"]

MAX_BYTES = 2**20
"""The largest policy file that is read."""

_MAX_DEPTH = 8  # of the YAML; a policy needs 5
_SHOWN_NAMES = 200  # characters of a list of names in a message
_SCORES = {"multinomial": (0.0, 1.0), "centroid": (-1.0, 1.0), "cast": (-1.0, 1.0)}
"""The smallest and largest score that a kind of gate can see, where there are any."""

_Path: TypeAlias = tuple[str, ...]
_T = TypeVar("_T")
_S = TypeVar("_S", bound="_Settings")


class PolicyError(SteeringError):
    """A setting of a policy is wrong.

    Attributes:
        path: the keys that lead to it.
        reason: what is wrong with it.
    """

    def __init__(self, path: _Path, reason: str) -> None:
        super().__init__(f"{_dotted(path)}: {reason}" if path else reason)
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[PolicyError], tuple[_Path, str]]:
        return PolicyError, (self.path, self.reason)


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
    """What is strict, immutable, and knows which of its fields were given."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    def __init__(self, /, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _first(error, type(self)) from None

    @classmethod
    def from_content(cls: type[_S], given: object) -> _S:
        """What a mapping says that may come from anywhere, `content()` among others.

        Raises:
            PolicyError: it is no mapping, or one of the wrong keys or values.
        """
        if not isinstance(given, Mapping):
            raise PolicyError(
                (), f"must be a mapping with keys such as {_keys(cls)}, not {quoted(given)}"
            )
        for key in given:
            if not isinstance(key, str):
                raise PolicyError((), f"the key {quoted(key)} is not a text")
        return cls(**given)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        # What was given takes part: it is what counts when one policy is laid over another.
        return self._given() == other._given()

    def __hash__(self) -> int:
        return hash(frozenset(self._given().items()))

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        return self.__copy__()  # all of it is immutable


class CategoryPolicy(_Settings):
    """What a policy says of one category. None, or null in a file, is as good as left out.

    Attributes:
        mode: what happens to a request that brings no `steering`: "auto" (gated), "always"
            (forced) or "off". None: gated where the router can decide its rule, off otherwise.
        strength: what the directions are multiplied by; 1.0 is what the pack recommends.
        threshold: of this category's gate, wherever a rule names it, in the unit of the score that
            the gate looks at. None: the router's own.
        scope: which tokens are steered, as a `Scope`, or anything that `Scope.parse` takes. None:
            the policy's.
        when: the rule by which it acts if it is gated, as a `Rule` or its text. None: its own gate
            is open.

    Raises:
        SteeringError: a value that is none of these, or another key.
    """

    mode: CategoryMode | None = None
    strength: Annotated[float, PlainValidator(_number)] = 1.0
    threshold: Annotated[float | None, _nullable(_number)] = None
    scope: Annotated[Scope | None, _nullable(Scope.parse)] = None
    when: Annotated[Rule | None, _nullable(_rule)] = None

    def content(self) -> dict[str, Any]:
        """What was given, as JSON data, in the order of the fields."""
        given = self._given()
        said = {name: given[name] for name in type(self).model_fields if name in given}
        if self.scope is not None:
            said["scope"] = self.scope.content()
        if self.when is not None:
            said["when"] = self.when.text
        return said


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
    """What holds for one category, with all defaults in place.

    Attributes:
        mode: "auto", "always" or "off".
        strength: finite.
        threshold: of its gate, or None for the router's own.
        scope: which tokens are steered.
        rule: what has to hold for it to act where it is gated.
    """

    mode: CategoryMode
    strength: float
    threshold: float | None
    scope: Scope
    rule: Rule


class Policy(_Settings):
    """What acts when. Immutable; equal to another that was given the same settings.

    Attributes:
        gate: which of the router's kinds of gate decides; one of `pysteer.pack.router.GATES`. None:
            "margin" if the router has it, else "multinomial"; see `gate_of`.
        conflict: what acts where several categories fire: "strongest" (the one whose score is
            furthest past its threshold), "first" (in the pack's order) or "sum" (all of them; with
            vectors that are much alike that is several times the strength, which ruins text).
        recheck: decide anew every that many response tokens. None: once, at the last prompt token.
        scope: of the categories that have none of their own.
        categories: category to `CategoryPolicy`, or to a mapping of its fields. A category that is
            not mentioned has their defaults.

    Raises:
        SteeringError: a value that is none of these, another key, or a threshold that no score of
            this kind of gate can cross.
    """

    gate: GateKind | None = None
    conflict: ConflictRule = "strongest"
    recheck: Annotated[int | None, _nullable(_count)] = None
    scope: Annotated[Scope, PlainValidator(Scope.parse)] = Scope()
    categories: Annotated[Mapping[str, CategoryPolicy], PlainValidator(_categories)] = Field(
        default_factory=lambda: MappingProxyType({})
    )
    # Where each setting was read, as "policy.yaml, line 9"; None for those that are from no file.
    _places: Mapping[_Path, str | None] = PrivateAttr(default_factory=dict)

    def __init__(self, /, **given: Any) -> None:
        super().__init__(**given)
        if self.gate is not None:  # else another policy, below this one, may say which
            self._check_thresholds(self.gate)

    def _check_thresholds(self, kind: GateKind) -> None:
        smallest, largest = _SCORES.get(kind, (None, None))
        for name, settings in self.categories.items():
            threshold = settings.threshold
            if smallest is None or largest is None or threshold is None:
                continue
            if not smallest <= threshold <= largest:
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
        """Read a policy from a YAML or JSON file. `check` then holds it against a pack.

        YAML is read as in version 1.2 (`off` is text), without anchors, aliases and tags.

        Raises:
            FormatError: it is no policy; names the file, the line and the setting.
        """
        path = Path(path)
        with naming(path), path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                raise SteeringError(f"larger than {MAX_BYTES} bytes: this is no policy")
            text = raw.decode("utf-8-sig")
        content, lines = _parsed(text, path)
        return _placed(content, {at: f"{path}, line {line}" for at, line in lines.items()})

    def content(self) -> dict[str, Any]:
        """What was given, as JSON data, which `from_content` reads."""
        given = self._given()
        said = {name: given[name] for name in type(self).model_fields if name in given}
        if "scope" in said:
            said["scope"] = self.scope.content()
        if "categories" in said:
            said["categories"] = {
                name: settings.content() for name, settings in self.categories.items()
            }
        return said

    def merged(self, other: Policy) -> Policy:
        """This policy with what `other` was given in the place of its own, per category too.

        Raises:
            SteeringError: together they contradict each other.
        """
        mine, theirs = self.content(), other.content()
        categories = dict(mine.get("categories", {}))
        for name, settings in theirs.get("categories", {}).items():
            categories[name] = {**categories.get(name, {}), **settings}
        content = {**mine, **theirs}
        if categories:
            content["categories"] = categories
        return _placed(content, {**self._all_places(), **other._all_places()})

    def of(self, category: str, gated: Collection[str] | None = None) -> CategorySettings:
        """What holds for one category, mentioned or not.

        Args:
            category: its name.
            gated: the categories that the router has gates for; None: every one.
        """
        settings = self.categories.get(category, _DEFAULT)
        rule = settings.when if settings.when is not None else Rule.of(category)
        mode = settings.mode
        if mode is None:
            mode = "auto" if gated is None or set(rule.names) <= set(gated) else "off"
        return CategorySettings(
            mode=mode,
            strength=settings.strength,
            threshold=settings.threshold,
            scope=settings.scope if settings.scope is not None else self.scope,
            rule=rule,
        )

    def gate_of(self, kinds: Collection[str]) -> GateKind:
        """Which kind of gate decides.

        Args:
            kinds: those that a router has.

        Raises:
            SteeringError: the policy asks for one that it does not have. A FormatError with file
                and line if it was read from a file.
        """
        if self.gate is None:
            return "margin" if "margin" in kinds else "multinomial"
        if self.gate not in kinds:
            self._refuse(
                ("gate",), f"the pack's router has no {self.gate} gate; it has {_listed(kinds)}"
            )
        return self.gate

    def check(
        self, *, categories: Collection[str], gated: Collection[str], kinds: Collection[str]
    ) -> None:
        """Hold the policy against what a pack has.

        Args:
            categories: those of the pack.
            gated: those that its router has gates for; none without a router.
            kinds: the kinds of gate that its router has; none without a router.

        Raises:
            SteeringError: it names a category that the pack does not hold, relies on a gate that
                the router does not have, or has a threshold that no score can cross. A
                FormatError with file and line if the setting was read from a file.
        """
        for name, settings in self.categories.items():
            self._check_known(("categories", name), name, categories)
            if settings.when is not None:
                for named in settings.when.names:
                    path = ("categories", name, "when")
                    self._check_known(path, named, categories)
                    self._check_gated(path, named, gated)
                if self.conflict == "strongest":
                    self._check_gated(
                        ("categories", name, "when"), name, gated, ", to be compared by 'strongest'"
                    )
            elif settings.mode == "auto":
                self._check_gated(
                    ("categories", name, "mode"), name, gated, "; use always, off, or a rule `when`"
                )
            if settings.threshold is not None:
                self._check_gated(("categories", name, "threshold"), name, gated)
        if kinds:
            self._check_thresholds(self.gate_of(kinds))

    def _check_known(self, path: _Path, name: str, categories: Collection[str]) -> None:
        if name not in categories:
            self._refuse(
                path, f"unknown category {quoted(name)}; this pack has {_listed(categories)}"
            )

    def _check_gated(
        self, path: _Path, name: str, gated: Collection[str], way_out: str = ""
    ) -> None:
        if name not in gated:
            there = f"its router knows {_listed(gated)}" if gated else "it has no router"
            self._refuse(path, f"the pack has no gate for {quoted(name)} ({there}){way_out}")

    def _refuse(self, path: _Path, reason: str) -> NoReturn:
        raise _located(PolicyError(path, reason), self._places)

    def _all_places(self) -> dict[_Path, str | None]:
        content = self.content()
        places: dict[_Path, str | None] = {(name,): None for name in content}
        for name, settings in content.get("categories", {}).items():
            places["categories", name] = None
            places.update({("categories", name, key): None for key in settings})
        return {**places, **self._places}


_DEFAULT = CategoryPolicy()


def _placed(content: object, places: Mapping[_Path, str | None]) -> Policy:
    """The policy that `content` is, read from `places`."""
    try:
        policy = Policy.from_content(content)
    except PolicyError as error:
        raise _located(error, places) from None
    policy._places = places
    return policy


def _located(error: PolicyError, places: Mapping[_Path, str | None]) -> SteeringError:
    """The error with its place in the file, if it is in one."""
    for end in range(len(error.path), -1, -1):
        if error.path[:end] in places:
            place = places[error.path[:end]]
            return error if place is None else FormatError(_at(place, error))
    return error


def _at(place: str, error: PolicyError) -> str:
    return f"{place}{', ' if error.path else ': '}{error}"


def _first(error: ValidationError, model: type[BaseModel]) -> PolicyError:
    """The first of the errors that pydantic found, in our words."""
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


def _dotted(path: _Path) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]{1,80}", part) else quoted(part) for part in path)


def _listed(names: Collection[str]) -> str:
    text = ", ".join(name if name.isprintable() else quoted(name) for name in names)
    return text if len(text) <= _SHOWN_NAMES else text[: _SHOWN_NAMES - 3] + "..."


# The file: YAML's events, of which JSON is a part, become plain data and the line of each key.


def _parsed(text: str, path: Path) -> tuple[Any, dict[_Path, int]]:
    """What the file says, and the line of each key from 1.

    From the events, not PyYAML's own construction: that has no lines, takes `off` for False, lets
    the last of two equal keys win and follows aliases.
    """
    import yaml  # here, because most packs are used without a file of policy

    if path.suffix.lower() == ".json":
        text = _as_yaml(text)
    written = text.splitlines() or [""]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Reader(path, yaml.parse(text, Loader=loader)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line if mark is not None else 0, len(written) - 1)
        reason = _one_line(error.problem or error.context)
        if isinstance(error, yaml.parser.ParserError) and _QUOTE_FIRST.match(written[line]):
            reason += "; put parentheses around a name in quotes at the start of a rule"
    except yaml.reader.ReaderError as error:
        line = text[: text.find(chr(error.character))].count("\n")
        reason = _one_line(error.reason)
    raise FormatError(f"{path}, line {line + 1}: not YAML: {reason}")


_QUOTE_FIRST = re.compile(r"""\s*["']?when["']?\s*:\s*['"]""")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


class _Reader:
    """YAML events to data: mappings, lists, text, numbers, truth values and nothing."""

    def __init__(self, path: Path, events: Iterator[Any]) -> None:
        self._path = path
        self._events = events
        self._lines: dict[_Path, int] = {}

    def document(self) -> tuple[Any, dict[_Path, int]]:
        """The only document of the file."""
        next(self._events)  # the start of the stream
        event = next(self._events)
        if type(event).__name__ == "StreamEndEvent":
            raise FormatError(f"{self._path}: no policy in it; an empty one is {{}}")
        self._lines[()] = 1
        value = self._value(next(self._events), ())
        next(self._events)  # the end of the document
        event = next(self._events)
        if type(event).__name__ != "StreamEndEvent":
            self._refuse(event, (), "a second document begins; a policy is one")
        return value, self._lines

    def _value(self, event: Any, path: _Path) -> Any:
        kind = type(event).__name__
        if kind == "AliasEvent" or event.anchor is not None:
            self._refuse(event, path, "anchors and aliases are not taken; write it out")
        if event.tag is not None:
            self._refuse(event, path, f"the tag {quoted(event.tag)} is not taken; leave it out")
        if kind == "ScalarEvent":
            return _plain(event.value) if event.implicit[0] else event.value
        if len(path) >= _MAX_DEPTH:
            self._refuse(event, path, f"nested more than {_MAX_DEPTH} deep")
        if kind == "SequenceStartEvent":
            items: list[Any] = []
            while type(event := next(self._events)).__name__ != "SequenceEndEvent":
                items.append(self._value(event, (*path, str(len(items)))))
            return items
        found: dict[str, Any] = {}
        while type(event := next(self._events)).__name__ != "MappingEndEvent":
            if type(event).__name__ not in ("ScalarEvent", "AliasEvent"):
                self._refuse(event, path, "a key is a list or a mapping, not a text")
            key = self._value(event, path)
            if not isinstance(key, str):
                self._refuse(
                    event, path, f"the key {quoted(event.value)} is not a text; put it in quotes"
                )
            here = (*path, key)
            if key in found:
                self._refuse(event, here, f"given twice, first in line {self._lines[here]}")
            self._lines[here] = event.start_mark.line + 1
            found[key] = self._value(next(self._events), here)
        return found

    def _refuse(self, event: Any, path: _Path, reason: str) -> NoReturn:
        place = f"{self._path}, line {event.start_mark.line + 1}"
        raise FormatError(_at(place, PolicyError(path, reason)))


def _plain(text: str) -> object:
    """What a scalar without quotes is in YAML 1.2, but that infinity and NaN stay text."""
    if _NULL.fullmatch(text):
        return None
    if truth := _BOOL.fullmatch(text):
        return truth[1] is not None
    if _INT.fullmatch(text) and len(text) < 20:  # longer ones are no counts
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _as_yaml(text: str) -> str:
    """JSON in the part of YAML that means the same.

    Escaped surrogate pairs and characters that YAML folds or refuses are the difference, and tabs,
    which JSON has only between its values.
    """

    def escaped(match: re.Match[str]) -> str:
        if match["high"]:
            return bytes.fromhex(match["high"] + match["low"]).decode("utf-16-be")
        return match[0] if match[0][0] == "\\" else f"\\U{ord(match[0]):08X}"

    pair = r"\\u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    odd = r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
    return re.sub(rf"{pair}|\\.|{odd}", escaped, text.replace("\t", " "))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
