"""The default reads of a router: layers and tokens."""

from __future__ import annotations

from pysteer.pack.router import Read

_USER_DEPTHS = (0.0, 2 / 15, 1 / 3, 7 / 15, 3 / 5)
_SUFFIX_DEPTHS = (4 / 15, 2 / 5, 8 / 15)


def default_reads(n_layer: int) -> tuple[Read, ...]:
    """Return the default reads of a router in a model of `n_layer` layers.

    The user's message at five layers from the lowest to the upper middle, and the tokens of the
    chat template behind the message, which sum up the request, at three. Words show best in low
    layers, topics in the middle. The exact layers make no measurable difference, so there is no
    search for them; several together tell categories apart better than any single layer. The last
    layer, where llama.cpp computes only rows whose logits are wanted, is used only if the model has
    no other.

    Examples:
        >>> [(read.layer, read.pooling) for read in default_reads(30)][-2:]
        [(12, 'suffix'), (16, 'suffix')]
    """
    last = max(n_layer - 2, 0)
    user = {min(last, round(depth * n_layer)) for depth in _USER_DEPTHS}
    suffix = {min(last, round(depth * n_layer)) for depth in _SUFFIX_DEPTHS}
    return (
        *(Read(layer, "user") for layer in sorted(user)),
        *(Read(layer, "suffix") for layer in sorted(suffix)),
    )
