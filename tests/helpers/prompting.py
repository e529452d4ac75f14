"""Prompts for the tests: words that tiny tokenizers know, on sides that are easy to tell apart."""

import json

import numpy as np

from pysteer.prompts import Prompt

WORDS = ("the", "of", "and", "sea", "oil", "ring", "all")


def rows(side, category, count):
    """Rows of a prompt file, always the same for the same arguments.

    Those of the side "harm" are unsafe and have the category, and one of two subcategories by
    turns; the nth of any other side is the twin of the nth unsafe one.
    """
    random = np.random.default_rng([*f"{side} {category}".encode()])
    unsafe = side == "harm"
    return [
        {
            "prompt": " ".join([side, category, *random.choice(WORDS, 4), str(i)]),
            "category": category if unsafe else "",
            "subcategory": "xy"[i % 2] if unsafe else "",
            "pair_id": f"{category} {i}",
            "label": "unsafe" if unsafe else "safe",
        }
        for i in range(count)
    ]


def prompts(side, category, count):
    """The same as prompts."""
    return [Prompt(**row) for row in rows(side, category, count)]


def write(path, content):
    """Write rows as a prompt file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
