"""Prompts for tests: words of the tiny tokenizers, on sides that are easy to tell apart."""

import json

import numpy as np

from pysteer.prompts import Prompt

WORDS = ("the", "of", "and", "sea", "oil", "ring", "all")


def rows(side, category, count):
    """Return rows of a prompt file, equal for equal arguments.

    Rows of the side "harm" are unsafe, with the category and alternately one of two subcategories.
    The nth row of any other side is the twin of the nth unsafe row.
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
    """Return `rows` as prompts."""
    return [Prompt(**row) for row in rows(side, category, count)]


def write(path, content):
    """Write rows as a prompt file, and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
