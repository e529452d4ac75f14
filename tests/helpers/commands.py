"""Checks of a command's exit code and output."""

import json


def check_mistake(result, *words):
    """Check for exit code 2 and one line on standard error that has the words in it.

    Args:
        result: exit code, standard output and standard error.
        *words: parts of the line.
    """
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("pysteer: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err


def strict_json(text):
    """Return JSON data; NaN and infinity, which other languages refuse, fail."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
