"""The protocol of extraction methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from pysteer.distribution import install_command
from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import Capture, Pooling, Row
from pysteer.extract.inputs import Inputs, TokenizedPrompt, rows_of
from pysteer.extract.methods.arithmetic import Activations, Direction
from pysteer.extract.reader import Reader
from pysteer.extract.sides import Sides
from pysteer.prompts import Prompt
from pysteer.settings import described

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from pysteer.extract.torch_model import TorchModel
    from pysteer.judge import Judge

Directions: TypeAlias = dict[str, dict[int, Direction]]
"""Category to layer to direction."""

O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class NoOptions:
    """Options of a method without options."""


@dataclass(frozen=True)
class Needs:
    """Inputs of a method beyond unsafe and safe prompts.

    Attributes:
        labels: each row has a label of "safe" or "unsafe", or a judge gives one.
        own_answers: the model answers prompts.
        safe_answers: safe answers to unsafe prompts, from the data or the built-in ones.
        gradients: the model runs in torch.
        everyday_prompts: safe prompts that share no topic with the unsafe prompts, on which the
            model must not change.
    """

    labels: bool = False
    own_answers: bool = False
    safe_answers: bool = False
    gradients: bool = False
    everyday_prompts: bool = False


@dataclass(frozen=True)
class Result:
    """Outcome of a method.

    Attributes:
        directions: category to layer to direction.
        figures: JSON data for the provenance.
        sides: the prompts used, if the method left some out.
    """

    directions: Directions
    figures: Mapping[str, Any] = field(default_factory=dict)
    sides: Sides[TokenizedPrompt] | None = None


@dataclass(frozen=True)
class Task(Generic[O]):
    """One extraction, as a method sees it.

    Attributes:
        inputs: the tokenized prompts.
        reader: the model.
        site: where in a block directions are sought.
        layers: layers, ascending.
        pooling: tokens whose activations are averaged.
        seed: of every choice.
        options: an instance of `Method.options`.
        answers: safe answers from the data.
        judge: a judge of answers; None: labels in the data decide.
        deadline: end of a descent, in seconds of `time.monotonic()`.
    """

    inputs: Inputs
    reader: Reader
    site: str
    layers: tuple[int, ...]
    pooling: Pooling
    seed: int
    options: O
    answers: Sequence[Prompt] = ()
    judge: Judge | None = None
    deadline: float = math.inf

    @property
    def sides(self) -> Sides[TokenizedPrompt]:
        """The prompts, split."""
        return self.inputs.sides

    def with_sides(self, sides: Sides[TokenizedPrompt]) -> Task[O]:
        """Return the task with other sides."""
        return replace(self, inputs=replace(self.inputs, sides=sides))

    def rows(self, prompts: Sequence[TokenizedPrompt]) -> list[Row]:
        """Return the tokens to run for each prompt; see `rows_of`."""
        return rows_of(self.reader.capture, prompts, self.pooling)

    def each(self, method: str, find: Callable[[str, int], Direction]) -> Directions:
        """Return the direction of each category and layer.

        Args:
            method: name of the method, for messages.
            find: from a category and an index into `layers` to a direction.

        Raises:
            SteeringError: there is no direction; with category and layer.
        """
        directions: Directions = {}
        for name in self.sides.unsafe:
            directions[name] = {}
            for index, layer in enumerate(self.layers):
                try:
                    directions[name][layer] = find(name, index)
                except SteeringError as error:
                    where = f"category {quoted(name)}, layer {layer}, method {method}"
                    raise SteeringError(f"{where}: {error}") from None
        return directions


class Method(ABC, Generic[O]):
    """A way to find directions.

    Attributes:
        name: the name that users write.
        summary: one line of help.
        options: a settings class, see `pysteer.settings`; its fields are the method's options.
        needs: inputs beyond unsafe and safe prompts.
        reads_answers: the method reads answers to unsafe prompts; prompts are neither pooled nor
            matched by category.
        keeps_scale: the directions have the right length already; they are neither masked nor
            scaled by default.
        scope: the token scope that suits the directions, as a policy writes it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type[DataclassInstance]] = NoOptions
    needs: ClassVar[Needs] = Needs()
    reads_answers: ClassVar[bool] = False
    keeps_scale: ClassVar[bool] = False
    # Steering on averaged activations also acts on its own effect, and answers repeat themselves.
    scope: ClassVar[str] = "prompt"

    def configured(self, options: Mapping[str, Any]) -> O:
        """Return an instance of `options`.

        Raises:
            SteeringError: an unknown option, or a value out of range.
        """
        known = described(self.options)
        for name in options:
            if name not in known:
                has = f"; it has {', '.join(known)}" if known else ""
                raise SteeringError(f"the method {self.name} has no option {quoted(name)}{has}")
        configured: Any = self.options(**options)
        return configured  # type: ignore[no-any-return]

    def needs_pairs(self, options: O) -> bool:
        """Return True if row i of the unsafe prompts must belong to row i of the safe prompts."""
        return False

    def check(self, task: Task[O]) -> None:
        """Check the inputs before anything runs, held-out prompts included.

        Raises:
            SteeringError: with file and line.
        """
        # Held-out prompts too: which prompts are at fault must not depend on the seed.
        task.rows(task.sides.all_unsafe)
        task.rows(task.sides.all_safe)

    @abstractmethod
    def find(self, task: Task[O]) -> Result:
        """Find the directions.

        Raises:
            SteeringError: there is no direction; with the category.
        """


class ArrayMethod(Method[O]):
    """A method that computes a direction from all activations of one layer."""

    @abstractmethod
    def direction(self, unsafe: Activations, safe: Activations, options: O) -> Direction:
        """Return the direction of one layer.

        Args:
            unsafe: activations of unsafe prompts, shape (n, n_embd).
            safe: activations of safe prompts, shape (m, n_embd).
            options: an instance of `options`.
        """

    def find(self, task: Task[O]) -> Result:
        """See `Method.find`."""
        sides = (task.sides.unsafe, task.sides.safe)
        rows = [row for side in sides for prompts in side.values() for row in task.rows(prompts)]
        activations = task.reader.activations(rows, task.site, task.layers)
        unsafe, safe = slices(sides)

        def one(name: str, index: int) -> Direction:
            return self.direction(
                activations[unsafe[name], index],
                activations[safe[task.sides.safe_key(name)], index],
                task.options,
            )

        return Result(task.each(self.name, one))


def slices(sides: Sequence[Mapping[str, Sequence[Any]]]) -> list[dict[str, slice]]:
    """Return the position of each side's groups in the concatenation of all groups."""
    parts: list[dict[str, slice]] = []
    start = 0
    for side in sides:
        parts.append({})
        for name, prompts in side.items():
            parts[-1][name] = slice(start, start + len(prompts))
            start += len(prompts)
    return parts


def torch_model(capture: Capture, method: str) -> TorchModel:
    """Return the model of a capture that runs in torch.

    Args:
        capture: the model.
        method: name of the method that needs gradients, for messages.

    Raises:
        SteeringError: torch is missing, or something else runs the model.
    """
    try:
        from pysteer.extract.torch_capture import TorchCapture
    except ImportError:
        raise SteeringError(
            f"{method} directions need torch; run: {install_command('extract')}"
        ) from None
    if not isinstance(capture, TorchCapture):
        raise SteeringError(f"{method} directions need torch; use --engine torch")
    return capture.model
