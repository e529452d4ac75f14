"""The rule for names of categories."""

from __future__ import annotations

from pysteer.errors import SteeringError, has_control, quoted


def check_category(name: object) -> None:
    """Check the name of a category.

    Raises:
        SteeringError: the name is not text, is blank, or holds control characters, which would act
            on the terminal that prints it.
    """
    if not isinstance(name, str) or not name.strip():
        raise SteeringError(f"{quoted(name)} is not a category name")
    if has_control(name):
        raise SteeringError(
            f"the category name {quoted(name)} holds control characters; rename the category, or "
            "the file whose name it is"
        )
