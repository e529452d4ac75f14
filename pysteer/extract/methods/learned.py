"""The method `learned`: gradient descent on the directions; see `pysteer.extract.learning`."""

from __future__ import annotations

from dataclasses import asdict, replace

from pysteer.extract.answers import safe_answers, warn_of_unused
from pysteer.extract.learning.settings import LearnedSettings
from pysteer.extract.methods.base import Method, Needs, Result, Task, torch_model


class Learned(Method[LearnedSettings]):
    """The method `learned`: safe answers become likely, answers to safe prompts stay."""

    name = "learned"
    summary = "gradient descent towards safe answers (needs torch)"
    options = LearnedSettings
    needs = Needs(safe_answers=True, gradients=True, everyday_prompts=True)
    reads_answers = True
    keeps_scale = True
    scope = "all"  # the directions are trained at all tokens

    def check(self, task: Task[LearnedSettings]) -> None:
        """See `Method.check`."""
        prompts = [p.prompt for p in task.sides.all_unsafe]
        safe_answers(prompts, task.answers)
        warn_of_unused(task.answers, prompts, task.sides.unsafe)

    def find(self, task: Task[LearnedSettings]) -> Result:
        """See `Method.find`."""
        from pysteer.extract.learning.learn import Example, learn  # needs torch

        model = torch_model(task.reader.capture, self.name)
        examples = {}
        for name, prompts in task.sides.unsafe.items():
            texts = safe_answers([p.prompt for p in prompts], task.answers)
            examples[name] = [
                Example(p.tokens, model.response_tokens(text) + model.end_of_turn)
                for p, text in zip(prompts, texts, strict=True)
            ]
        settings = replace(task.options, seed=task.seed)
        learned = learn(
            model,
            examples,
            [p.tokens for prompts in task.sides.safe.values() for p in prompts],
            layers=task.layers,
            site=task.site,
            settings=settings,
            progress=task.reader.progress,
            folder=task.reader.folder,
            deadline=task.deadline,
        )
        figures = {
            "settings": asdict(settings),
            "categories": {
                name: {
                    "steps": one.steps,
                    "best_step": one.best_step,
                    "validation_loss": one.validation_loss,
                    "validation_kl": one.validation_kl,
                }
                for name, one in learned.categories.items()
            },
        }
        return Result(
            {name: one.directions for name, one in learned.categories.items()},
            {"learned": figures},
        )
