"""What the notebooks' exercises call: each check_... takes the reader's function and says what is wrong with it.

A solution in a notebook takes the place of a stub only while it is empty (solution_of), so that a notebook runs from
top to bottom and a reader's own answer is what is checked. It imports no other module of the package.
"""

import torch
import torch.nn.functional as F


class WrongAnswer(Exception):
    """What is wrong with an answer, in a sentence; a notebook shows it without a traceback."""

    def _render_traceback_(self):
        return [f"not yet: {self}"]


def solution_of(stub):
    """A decorator that puts a solution in the place of an empty stub, and leaves an answer as it is."""
    def empty():
        ...

    return lambda solution: solution if stub.__code__.co_code == empty.__code__.co_code else stub


def compare(found, expected, faults: dict):
    """WrongAnswer if found is not expected; faults: what typical mistakes give, by the sentence that names them."""
    if not isinstance(found, torch.Tensor):
        raise WrongAnswer(f"it returned {found!r}, not a tensor")
    if found.shape != expected.shape:
        raise WrongAnswer(f"it returned the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if torch.allclose(found.to(expected), expected, atol=1e-5, rtol=1e-4):
        print("right")
        return
    for sentence, wrong in faults.items():
        if wrong.shape == found.shape and torch.allclose(found.to(expected), wrong, atol=1e-5, rtol=1e-4):
            raise WrongAnswer(sentence)
    raise WrongAnswer(f"its numbers differ from the right ones by up to {(found - expected).abs().max():.2g}")


def _random(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# 01_attention


def check_attention(attention):
    """attention(q, k, v): (N, C) each -> (N, C)."""
    q, k, v = (_random(5, 4, seed=seed) for seed in range(3))
    scores = q @ k.T / 2
    compare(attention(q, k, v), scores.softmax(dim=1) @ v, {
        "the scores are not divided by the root of the number of channels": (2 * scores).softmax(dim=1) @ v,
        "the scores are divided by the number of channels, not by its root": (scores / 2).softmax(dim=1) @ v,
        "the softmax runs over the queries (a column); each query's weights, a row, must sum to one":
            scores.softmax(dim=0) @ v,
        "queries and keys have changed places": scores.T.softmax(dim=1) @ v,
        "there is no softmax": scores @ v,
    })


def check_split_heads(split_heads):
    """split_heads(x, heads): (B, N, C) -> (B, H, N, C/H)."""
    x = _random(2, 5, 12)
    right = x.unflatten(2, (3, 4)).transpose(1, 2)
    compare(split_heads(x, 3), right, {
        "the channels of a head are not neighbours: split C into (H, C/H), not into (C/H, H)":
            x.unflatten(2, (4, 3)).permute(0, 3, 1, 2),
        "tokens and channels are mixed up: a reshape straight to (B, H, N, C/H) cuts across tokens; split C first, "
        "then move the heads": x.reshape(2, 3, 5, 4),
    })


def check_map_similarity(similarity):
    """similarity(maps): (B, H, N, N) -> a number, the mean cosine similarity of two heads' maps of one picture."""
    maps = _random(3, 4, 6, 6).softmax(dim=3)
    unit = F.normalize(maps.flatten(2), dim=2)  # (B, H, N * N)
    cosines = unit @ unit.transpose(1, 2)  # (B, H, H)
    others = ~torch.eye(4, dtype=torch.bool)
    across = F.normalize(maps.flatten(1), dim=1)
    compare(torch.as_tensor(similarity(maps)), cosines[:, others].mean(), {
        "each head is compared with itself too, which is always one: leave the diagonal out": cosines.mean(),
        "whole pictures are compared, not heads": (across @ across.T)[~torch.eye(3, dtype=torch.bool)].mean(),
        "the maps are not scaled to length one": (maps.flatten(2) @ maps.flatten(2).transpose(1, 2))[:, others].mean(),
    })
