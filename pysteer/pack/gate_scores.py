"""Formulas of the scores of a router's gates.

h, float64, is one hidden state of shape (w,) or a row for each of several, (rows, w); k is the
number of categories, and results have the shape (k,) or (rows, k).
"""

from __future__ import annotations

import numpy as np

from pysteer.pack.arrays import Floats


def softmax(logits: Floats) -> Floats:
    """Return the softmax along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def margin(r: Floats, allowances: Floats) -> Floats:
    """Return the lesser of harm and lead plus allowance: min(-r_0, `lead`).

    Args:
        r: W h + b, a column for "benign" and one for each category.
        allowances: shape (k,).
    """
    return np.minimum(-r[..., :1], lead(r, allowances))


def lead(r: Floats, allowances: Floats) -> Floats:
    """Return the lead of each category over all others, plus its allowance.

    The lead of category c is r_c minus the largest r of the other categories; 0 if there is no
    other category.

    Args:
        r: W h + b, a column for "benign" and one for each category.
        allowances: shape (k,).
    """
    r = r[..., 1:]
    leads = np.zeros_like(r)
    if r.shape[-1] > 1:
        ordered = np.sort(r, axis=-1)
        largest, second = ordered[..., -1:], ordered[..., -2:-1]
        leads = r - np.where(r == largest, second, largest)
    return np.asarray(leads + allowances)


def centroid_cosine(h: Floats, centroids: Floats) -> Floats:
    """Return the cosine of h - m and m_c - m for each category c; 0 where a length is 0.

    m_c is the category's centroid, m the mean of all k + 1 centroids. Activations of a layer share
    a large mean, which leaves cosines measured from zero all near 1.

    Args:
        h: hidden states.
        centroids: shape (k + 1, w), row 0 for "benign".
    """
    origin = centroids.mean(axis=0)
    rows = h - origin
    return np.stack([cosine(rows, own - origin) for own in centroids[1:]], axis=-1)


def condition_similarity(h: Floats, conditions: Floats) -> Floats:
    """Return cosine(h, tanh((c c^T / c.c) h)) for each condition c; 0 where a length is 0.

    Source: CAST, arXiv 2409.05907, section 3.

    Args:
        h: hidden states.
        conditions: shape (k, w).
    """
    columns = []
    for c in conditions:  # one at a time: rows x k x w can be large
        projected = np.multiply.outer(h @ c / (c @ c), c)
        columns.append(cosine(h, np.tanh(projected)))
    return np.stack(columns, axis=-1)


def cosine(a: Floats, b: Floats) -> Floats:
    """Return the cosine along the last axis; 0 where a length is 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = np.einsum("...i,...i->...", a, b)
    return np.asarray(np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0))
