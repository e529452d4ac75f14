"""Settings of gradient descent on directions."""

from __future__ import annotations

from dataclasses import dataclass

from pysteer.errors import SteeringError, quoted
from pysteer.settings import check, setting


class OutOfTimeError(SteeringError):
    """The deadline passed before the first useful step."""


@dataclass(frozen=True)
class LearnedSettings:
    """Settings of `pysteer.extract.learning.learn.learn`; the options of the method `learned`.

    Attributes:
        learning_rate: of Adam, as a share of the typical size of one component of the residual
            stream at each layer (`SteeredForward.typical_sizes`), so that it suits any model. It
            falls linearly to a tenth over a run's steps.
        batch_size: unsafe prompts per step.
        benign_batch_size: benign prompts per step.
        shared_steps: most steps for the vector shared by all categories; 0: no shared vector.
        category_steps: most steps for each category, from the shared vector.
        category_rate: learning rate of a category's first step from the shared vector, as a share
            of learning_rate: full steps would leave the place that the shared vector has reached.
        kl_weight: weight of the term that holds the model still on benign prompts.
        kl_tokens: number of tokens of each answer to a benign prompt in the KL term.
        first_token_weight: weight of the first token of an answer; each other token counts once.
        max_benign: most benign prompts used, drawn by the seed.
        max_tokens: longer examples and benign prompts are left out.
        validation_share: share of a category's prompts, and of the benign prompts, kept aside to
            choose the best state by.
        validation_prompts: most unsafe, and most benign, prompts in a validation loss.
        min_prompts: categories with fewer distinct prompts are trained on all of them.
        check_every: steps between two validation losses.
        patience: a run stops after so many validation losses in a row without a lower one.
        seed: of the split, the order of the prompts and the choice of benign prompts.

    Raises:
        SteeringError: a value is out of its range.
    """

    learning_rate: float = setting(0.5, "Of Adam, relative to the residual stream.", above=0)
    batch_size: int = setting(8, "Unsafe prompts per step.", 1)
    benign_batch_size: int = setting(4, "Benign prompts per step.", 1)
    shared_steps: int = setting(60, "Most steps for the vector shared by all categories.", 0)
    category_steps: int = setting(10, "Most steps for each category.", 0)
    category_rate: float = setting(0.1, "Share of learning_rate for a category's steps.", above=0)
    kl_weight: float = setting(1.0, "Weight of staying still on benign prompts.", 0)
    kl_tokens: int = setting(8, "Tokens of answers to benign prompts that are held.", 1)
    first_token_weight: float = setting(4.0, "Weight of an answer's first token.", 1)
    max_benign: int = setting(128, "Most benign prompts used.", 1)
    max_tokens: int = setting(1024, "Longer prompts are left out.", 1)
    validation_share: float = setting(0.2, "Share of prompts kept to validate.", 0, below=1)
    validation_prompts: int = setting(8, "Most prompts of each kind in a validation.", 1)
    min_prompts: int = setting(10, "Fewer prompts of a category are all trained on.", 1)
    check_every: int = setting(5, "Steps between two validations.", 1)
    patience: int = setting(3, "Validations without progress before a run stops.", 1)
    seed: int = 0  # not an option: the extraction's seed decides

    def __post_init__(self) -> None:
        check(self)
        if self.seed < 0:
            raise SteeringError(f"seed must be at least 0, not {quoted(self.seed)}")
        if not self.shared_steps and not self.category_steps:
            raise SteeringError("shared_steps and category_steps are both 0; raise shared_steps")
