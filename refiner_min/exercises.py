"""What the notebooks' exercises call: each check_... takes the reader's function and says what is wrong with it.

A solution in a notebook takes the place of a stub only while it is empty (solution_of), so that a notebook runs from
top to bottom and a reader's own answer is what is checked. It imports no other module of the package.
"""

import dis
import math

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

    def steps(function):
        return [(step.opname, step.argval) for step in dis.get_instructions(function)]

    return lambda solution: solution if steps(stub) == steps(empty) else stub


def answer(function, *inputs):
    """What the reader's function returns for copies of the inputs, which it may change. WrongAnswer: nothing."""
    found = function(*(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs))
    if found is None:
        raise WrongAnswer("it returned nothing: does it end with a return?")
    return found


def compare(found, expected, faults: dict):
    """Say that found is right. WrongAnswer: it is not; faults: what typical mistakes give, by the sentence that names
    them."""
    compare_quietly(found, expected, faults)
    print("right")


def compare_quietly(found, expected, faults: dict):
    if not isinstance(found, torch.Tensor):
        raise WrongAnswer(f"it returned {found!r}, not a tensor")
    found = found.to(expected)

    def is_like(tensor):
        return found.shape == tensor.shape and torch.allclose(found, tensor, atol=1e-5, rtol=1e-4)

    if is_like(expected):
        return
    for sentence, wrong in faults.items():
        if is_like(wrong):
            raise WrongAnswer(sentence)
    if found.shape != expected.shape:
        raise WrongAnswer(f"it returned the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    raise WrongAnswer(f"its numbers differ from the right ones by up to {(found - expected).abs().max():.2g}")


def _random(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# 01_attention


def check_attention(attention):
    """attention(q, k, v): (N, C) each -> (N, C)."""
    q, k, v = (_random(5, 4, seed=seed) for seed in range(3))
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
    x = _random(2, 5, 12)
    right = x.unflatten(2, (3, 4)).transpose(1, 2)
    compare(answer(split_heads, x, 3), right, {
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
    compare(torch.as_tensor(answer(similarity, maps)), cosines[:, others].mean(), {
        "each head is compared with itself too, which is always one: leave the diagonal out": cosines.mean(),
        "whole pictures are compared, not heads": (across @ across.T)[~torch.eye(3, dtype=torch.bool)].mean(),
        "the maps are not scaled to length one": (maps.flatten(2) @ maps.flatten(2).transpose(1, 2))[:, others].mean(),
    })


# ----------------------------------------------------------------------------------------------------------------------
# 02_expansion


def check_expand(expand):
    """expand(maps, weight): (B, H, N, N) and (E, H) -> (B, E, N, N)."""
    maps, weight = _random(2, 3, 4, 4).softmax(dim=3), _random(6, 3, seed=1)
    compare(answer(expand, maps, weight), torch.einsum("eh,bhij->beij", weight, maps), {
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
    compare(torch.tensor([float(answer(parameters, *case)) for case in cases]),
            torch.tensor([float(count(*case)) for case in cases]), {
        sentence: torch.tensor([float(count(*case, **without)) for case in cases]) for sentence, without in (
            ("the BatchNorms are missing: a weight and a bias for each of their maps", dict(norms=False)),
            ("the BatchNorm after the skip is missing", dict(last=False)),
            ("the local convolution is depth-wise: one k x k kernel a map, which sees no other map",
             dict(depthwise=False)))})


def check_collapse(collapse):
    """collapse(expansion, reduction): (E, H) and (H, E) -> (H, H)."""
    expansion, reduction = _random(8, 4), _random(4, 8, seed=1)
    compare(answer(collapse, expansion, reduction), reduction @ expansion, {
        "that is an expansion after a reduction, (E, E): what is applied first stands on the right":
            expansion @ reduction,
        "it is transposed": (reduction @ expansion).T,
        "the two are added, not applied one after the other": reduction + expansion.T,
    })


# ----------------------------------------------------------------------------------------------------------------------
# 03_local_conv


def check_convolve(convolve):
    """convolve(maps, kernels): (B, H, N, N) and (H, k, k) -> (B, H, N, N)."""
    maps, kernels = _random(2, 3, 7, 7).softmax(dim=3), _random(3, 5, 5, seed=1)
    right = F.conv2d(maps, kernels[:, None], padding=2, groups=3)
    same = F.conv2d(maps, kernels[:1, None].expand(3, -1, -1, -1), padding=2, groups=3)
    mixed = F.conv2d(maps, kernels[None].expand(3, -1, -1, -1), padding=2)
    compare(answer(convolve, maps, kernels), right, {
        "every head is convolved with the kernel of the first": same,
        "the heads are mixed: a kernel a head means groups=heads": mixed,
        "the kernel is turned round: deep learning's convolution is a correlation":
            F.conv2d(maps, kernels.flip(1, 2)[:, None], padding=2, groups=3),
        "the maps have shrunk: pad by k // 2": F.conv2d(maps, kernels[:, None], groups=3),
    })


def check_shift_rows(shift):
    """shift(map, offset): (N, N) -> the map whose row i is row i + offset, zero where there is none."""
    values = torch.arange(1.0, 26).reshape(5, 5)

    def moved(x, offset, dim=0, wrap=False):
        rolled = x.roll(-offset, dim)
        keep = (torch.arange(5) + offset >= 0) & (torch.arange(5) + offset < 5)
        return rolled if wrap else rolled * (keep[:, None] if dim == 0 else keep)

    for offset in (-1, 0, 2):
        try:
            compare_quietly(answer(shift, values, offset), moved(values, offset), {
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
        places = answer(window, *case)
        try:
            found = {tuple(place) for place in places}
        except TypeError:
            raise WrongAnswer(f"it returned {places!r}, not a set of (row, col)") from None
        if found == by_index(*case):
            continue
        if (-1, case[1] - 1) in found:
            raise WrongAnswer("row -1 is not on the grid: token 0 is the class token; leave it out")
        if found == around(*case):
            raise WrongAnswer("that is a window on the grid; the kernel runs along the row of tokens only")
        if found == {place for place in by_index(*case) if place[0] == (case[0] - 1) // case[1]}:
            raise WrongAnswer("a row's end is no wall: its right neighbour is the first patch of the next row")
        raise WrongAnswer(f"for token {case[0]} of a grid of {case[1]} with a kernel of {case[2]} it gives "
                          f"{sorted(found)}, not {sorted(by_index(*case))}")
    print("right")


# ----------------------------------------------------------------------------------------------------------------------
# 04_relabeling


def check_spread_out(spread_out):
    """spread_out(logits, ids, num_classes): (B, k, H, W) each -> (B, K, H, W), logit 0 for what is not kept."""
    scores = _random(2, 6, 3, 4)
    logits, ids = scores.topk(3, dim=1)
    right = torch.zeros(2, 6, 3, 4).scatter(1, ids, logits)
    compare(answer(spread_out, logits, ids, 6), right, {
        "the classes that are left out are -inf; the published code, and ours, count them as logit 0":
            torch.full((2, 6, 3, 4), -torch.inf).scatter(1, ids, logits),
        "there is a softmax already; it comes after the pooling": right.softmax(dim=1),
        "the logits are put in the order of their rank, not at their class": F.pad(logits, (0, 0, 0, 0, 0, 3)),
    })


def check_compose(compose):
    """compose(outer, inner): boxes (4,) x1, y1, x2, y2; inner in fractions of outer -> in those of the whole."""
    outer, inner = torch.tensor([0.2, 0.1, 0.8, 0.5]), torch.tensor([0.5, 0.25, 1.0, 0.75])
    sides, swapped = (outer[2:] - outer[:2]).repeat(2), (outer[2:] - outer[:2]).flip(0).repeat(2)
    compare(answer(compose, outer, inner), outer[:2].repeat(2) + inner * sides, {
        "the inner box is scaled but not moved: it starts at the outer one's corner": inner * sides,
        "the inner box is moved but not scaled": outer[:2].repeat(2) + inner,
        "width and height have changed places": outer[:2].repeat(2) + inner * swapped,
        "the two boxes are multiplied": outer * inner,
    })


def check_mirror_overlap(overlap):
    """overlap(box): box (4,) x1, y1, x2, y2 -> intersection over union with its mirror image across the diagonal."""
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5], [0.6, 0.0, 0.9, 0.2]])
    x1, y1, x2, y2 = boxes.T
    area, side = (x2 - x1) * (y2 - y1), torch.minimum(x2, y2) - torch.maximum(x1, y1)
    met = side.clamp(min=0) ** 2
    compare(torch.stack([torch.as_tensor(answer(overlap, box)) for box in boxes]), met / (2 * area - met), {
        "boxes that do not meet have an intersection too: a side below zero counts as zero":
            side**2 / (2 * area - side**2),
        "the sum of the areas is no union: what both cover is counted twice in it": met / (2 * area),
        "the intersection is divided by the box's own area, not by the union": met / area,
    })


def check_mixed_label(mixed_label):
    """mixed_label(labels, box, grid): (B, K) and MixToken's box -> the labels of the mixed pictures, (B, K)."""
    labels, box = F.one_hot(torch.tensor([0, 2, 1, 4]), 5).float(), (1, 0, 4, 2)
    share = 6 / 16
    compare(answer(mixed_label, labels, box, 4), (1 - share) * labels + share * labels.flip(0), {
        "own and partner have changed places: the box's share is the partner's":
            share * labels + (1 - share) * labels.flip(0),
        "the partner is the picture at the other end of the batch: flip(0), not the next one":
            (1 - share) * labels + share * labels.roll(1, 0),
        "the share is that of the box's sides, not of its area": (1 - 5 / 8) * labels + 5 / 8 * labels.flip(0),
        "the labels are not mixed": labels,
    })


# ----------------------------------------------------------------------------------------------------------------------
# 05_full_training


def check_schedule(rate):
    """rate(step, warmup, total): the share of the peak learning rate; linear warm-up, then half a cosine to zero that
    counts from step 0."""
    def curve(step, warmup, total, begin=0, whole=1):
        if step < warmup:
            return step / warmup
        return (1 + math.cos(whole * math.pi * (step - begin) / (total - begin))) / 2

    steps = [0, 3, 9, 10, 11, 35, 60, 99]
    right = torch.tensor([curve(step, 10, 100) for step in steps])
    compare(torch.tensor([float(answer(rate, step, 10, 100)) for step in steps]), right, {
        "the warm-up begins at 0, and the cosine where the warm-up ends": torch.tensor(
            [(step + 1) / 11 if step < 10 else curve(step, 10, 100, begin=10) for step in steps]),
        "the warm-up begins at 0": torch.tensor([(step + 1) / 11 if step < 10 else curve(step, 10, 100)
                                                 for step in steps]),
        "the cosine counts from step 0, not from the end of the warm-up":
            torch.tensor([curve(step, 10, 100, begin=10) for step in steps]),
        "the cosine runs a whole turn and climbs again; half a turn ends at zero":
            torch.tensor([curve(step, 10, 100, whole=2) for step in steps]),
        "there is no warm-up": torch.tensor([(1 + math.cos(math.pi * step / 100)) / 2 for step in steps]),
    })


def check_average(average):
    """average(old, weights, decay): the moving average after one more step."""
    old, weights = _random(5), _random(5, seed=1)
    compare(answer(average, old, weights, 0.9), 0.9 * old + 0.1 * weights, {
        "the weights have changed places: the decay is the share that stays": 0.1 * old + 0.9 * weights,
        "the new weights are added without their share": 0.9 * old + weights,
        "that is a plain mean of the two": (old + weights) / 2,
    })


def check_drop_rates(rates):
    """rates(depth, last): drop path's rate of each block, rising linearly from 0 to last."""
    found = answer(rates, 6, 0.25)
    try:
        found = torch.tensor([float(rate) for rate in found])
    except TypeError:
        raise WrongAnswer(f"it returned {found!r}, not a list of rates, one for each block") from None
    compare(found, torch.linspace(0, 0.25, 6), {
        "every block has the same rate; it must rise from 0 at the first": torch.full((6,), 0.25),
        "the last block does not reach the rate: divide by depth - 1": 0.25 * torch.arange(6) / 6,
        "the first block has a rate above zero": 0.25 * torch.arange(1, 7) / 6,
        "the rates fall; they must rise": torch.linspace(0.25, 0, 6),
    })
