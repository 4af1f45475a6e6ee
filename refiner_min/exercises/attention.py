"""The checks of notebooks/01_attention.ipynb."""

import torch
import torch.nn.functional as F

from refiner_min.exercises import answer, compare, random


def check_attention(attention):
    """attention(q, k, v): (N, C) each -> (N, C)."""
    q, k, v = (random(5, 4, seed=seed) for seed in range(3))
    scores = q @ k.T / 2
    compare(answer(attention, q, k, v), scores.softmax(dim=1) @ v, {
        "the scores are not divided by the root of the number of channels": (2 * scores).softmax(dim=1) @ v,
        "the scores are divided by the number of channels, not by its root": (scores / 2).softmax(dim=1) @ v,
        "the softmax runs over the queries (a column); each query's weights, a row, must sum to one":
            scores.softmax(dim=0) @ v,
        "queries and keys have changed places": scores.T.softmax(dim=1) @ v,
        "there is no softmax": scores @ v,
    })


def check_split_heads(split_heads):
    """split_heads(x, heads): (B, N, C) -> (B, H, N, C/H)."""
    x = random(2, 5, 12)
    right = x.unflatten(2, (3, 4)).transpose(1, 2)
    compare(answer(split_heads, x, 3), right, {
        "the channels of a head are not neighbours: split C into (H, C/H), not into (C/H, H)":
            x.unflatten(2, (4, 3)).permute(0, 3, 1, 2),
        "tokens and channels are mixed up: a reshape straight to (B, H, N, C/H) cuts across tokens; split C first, "
        "then move the heads": x.reshape(2, 3, 5, 4),
    })


def check_map_similarity(similarity):
    """similarity(maps): (B, H, N, N) -> a number, the mean cosine similarity of two heads' maps of one picture."""
    maps = random(3, 4, 6, 6).softmax(dim=3)
    unit = F.normalize(maps.flatten(2), dim=2)  # (B, H, N * N)
    cosines = unit @ unit.transpose(1, 2)  # (B, H, H)
    others = ~torch.eye(4, dtype=torch.bool)
    across = F.normalize(maps.flatten(1), dim=1)
    compare(torch.as_tensor(answer(similarity, maps)), cosines[:, others].mean(), {
        "each head is compared with itself too, which is always one: leave the diagonal out": cosines.mean(),
        "whole pictures are compared, not heads": (across @ across.T)[~torch.eye(3, dtype=torch.bool)].mean(),
        "the maps are not scaled to length one": (maps.flatten(2) @ maps.flatten(2).transpose(1, 2))[:, others].mean(),
    })
