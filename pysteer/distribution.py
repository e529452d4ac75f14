"""The distribution that brings pysteer: its version, and the commands that install it.

The import is `pysteer`. The distribution has another name: PyPI's `pysteer` is another project.
"""

from __future__ import annotations

from typing import Final

DISTRIBUTION: Final = "pysteer-llama"


def installed_version() -> str:
    """Return the version of the installed distribution, such as "0.1.0"."""
    from importlib.metadata import version  # slow

    return version(DISTRIBUTION)


def install_command(extra: str) -> str:
    """Return the command that installs pysteer with an extra.

    Args:
        extra: name of an extra in pyproject.toml, such as "plot".

    Examples:
        >>> install_command("plot")
        "pip install 'pysteer-llama[plot]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"
