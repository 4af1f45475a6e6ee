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
    """Say that found is right. WrongAnswer: it is not; faults: what typical mistakes give, by the sentence that names
    them."""
    compare_quietly(found, expected, faults)
    print("right")


def compare_quietly(found, expected, faults: dict):
    if not isinstance(found, torch.Tensor):
        raise WrongAnswer(f"it returned {found!r}, not a tensor")
    if found.shape != expected.shape:
        raise WrongAnswer(f"it returned the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if torch.allclose(found.to(expected), expected, atol=1e-5, rtol=1e-4):
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


# ----------------------------------------------------------------------------------------------------------------------
# 02_expansion


def check_expand(expand):
    """expand(maps, weight): (B, H, N, N) and (E, H) -> (B, E, N, N)."""
    maps, weight = _random(2, 3, 4, 4).softmax(dim=3), _random(6, 3, seed=1)
    compare(expand(maps, weight), torch.einsum("eh,bhij->beij", weight, maps), {
        "queries and keys of the maps have changed places": torch.einsum("eh,bhij->beji", weight, maps),
        "the weights are turned into shares by a softmax; they are free numbers":
            torch.einsum("eh,bhij->beij", weight.softmax(dim=1), maps),
        "every new map is the same: sum over the heads, but keep one row of the weights for each new map":
            torch.einsum("eh,bhij->bij", weight, maps)[:, None].expand(-1, 6, -1, -1),
    })


def check_parameters(parameters):
    """parameters(heads, ratio, kernel): how many a published refinement has."""
    def count(heads, ratio, kernel, norms=True, last=True, depthwise=True):
        expanded = ratio * heads
        weights = heads * expanded + expanded * kernel**2 * (1 if depthwise else expanded) + expanded * heads
        return weights + (2 * (2 * expanded + heads) if norms else 0) + (2 * heads if norms and last else 0)

    cases = [(12, 3, 3), (4, 3, 3), (16, 2, 5)]
    compare(torch.tensor([float(parameters(*case)) for case in cases]),
            torch.tensor([float(count(*case)) for case in cases]), {
        sentence: torch.tensor([float(count(*case, **without)) for case in cases]) for sentence, without in (
            ("the BatchNorms are missing: a weight and a bias for each of their maps", dict(norms=False)),
            ("the BatchNorm after the skip is missing", dict(last=False)),
            ("the local convolution is depth-wise: one k x k kernel a map, which sees no other map",
             dict(depthwise=False)))})


def check_collapse(collapse):
    """collapse(expansion, reduction): (E, H) and (H, E) -> (H, H)."""
    expansion, reduction = _random(8, 4), _random(4, 8, seed=1)
    compare(collapse(expansion, reduction), reduction @ expansion, {
        "that is expansion after reduction, an (E, E) matrix's corner: the expansion comes first, so it stands right":
            (expansion @ reduction)[:4, :4],
        "it is transposed": (reduction @ expansion).T,
        "the two are added, not applied one after the other": reduction + expansion.T,
    })


# ----------------------------------------------------------------------------------------------------------------------
# 03_local_conv


def check_convolve(convolve):
    """convolve(maps, kernels): (B, H, N, N) and (H, k, k) -> (B, H, N, N)."""
    maps, kernels = _random(2, 3, 5, 5).softmax(dim=3), _random(3, 3, 3, seed=1)
    right = F.conv2d(maps, kernels[:, None], padding=1, groups=3)
    same = F.conv2d(maps, kernels[:1, None].expand(3, -1, -1, -1), padding=1, groups=3)
    mixed = F.conv2d(maps, kernels[None].expand(3, -1, -1, -1), padding=1)
    compare(convolve(maps, kernels), right, {
        "every head is convolved with the kernel of the first": same,
        "the heads are mixed: a kernel a head means groups=heads": mixed,
        "the kernel is turned round: deep learning's convolution is a correlation":
            F.conv2d(maps, kernels.flip(1, 2)[:, None], padding=1, groups=3),
    })


def check_shift_rows(shift):
    """shift(map, offset): (N, N) -> the map whose row i is row i + offset, zero where there is none."""
    values = torch.arange(1.0, 26).reshape(5, 5)

    def moved(x, offset, dim=0, wrap=False):
        rolled = x.roll(-offset, dim)
        keep = (torch.arange(5) + offset >= 0) & (torch.arange(5) + offset < 5)
        return rolled if wrap else rolled * (keep[:, None] if dim == 0 else keep)

    for offset in (-1, 0, 1):
        try:
            compare_quietly(shift(values, offset), moved(values, offset), {
                "the rows are moved the other way": moved(values, -offset),
                "columns are moved, not rows": moved(values, offset, dim=1),
                "rows that leave at one end come back at the other, where there must be zeros":
                    moved(values, offset, wrap=True),
            })
        except WrongAnswer as fault:
            raise WrongAnswer(f"with offset {offset}, {fault}") from None
    print("right")


def check_effective_window(window):
    """window(token, grid, kernel): the patches that a k x k kernel joins with a patch, as (row, col) on the grid."""
    def by_index(token, grid, kernel):
        reach = range(token - kernel // 2, token + kernel // 2 + 1)
        return {((index - 1) // grid, (index - 1) % grid) for index in reach if 1 <= index <= grid * grid}

    def around(token, grid, kernel):
        row, col = (token - 1) // grid, (token - 1) % grid
        half = kernel // 2
        return {(r, c) for r in range(row - half, row + half + 1) for c in range(col - half, col + half + 1)
                if 0 <= r < grid and 0 <= c < grid}

    for case in ((6, 4, 3), (4, 4, 3), (1, 4, 3), (16, 4, 5)):
        found = {tuple(place) for place in window(*case)}
        if found == by_index(*case):
            continue
        if found == around(*case):
            raise WrongAnswer("that is a window on the grid; the kernel runs along the row of tokens only")
        if found == {place for place in by_index(*case) if place[0] == (case[0] - 1) // case[1]}:
            raise WrongAnswer("a row's end is no wall: its right neighbour is the first patch of the next row")
        raise WrongAnswer(f"for token {case[0]} of a grid of {case[1]} with a kernel of {case[2]} it gives "
                          f"{sorted(found)}, not {sorted(by_index(*case))}")
    print("right")
