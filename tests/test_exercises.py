"""exercises.py: every check takes a right answer and names the fault of wrong ones; a solution replaces empty stubs
only."""

import math

import pytest
import torch
import torch.nn.functional as F

from refiner_min import exercises
from refiner_min.exercises import WrongAnswer


def similarity(maps):
    unit = F.normalize(maps.flatten(2), dim=2)
    cosines, heads = unit @ unit.transpose(1, 2), maps.shape[1]
    return (cosines.sum(dim=(1, 2)) - heads).mean() / (heads * (heads - 1))


def parameters(heads, ratio, kernel):
    expanded = ratio * heads
    return 2 * heads * expanded + expanded * kernel**2 + 4 * expanded + 4 * heads


def shift(x, offset):
    out = torch.zeros_like(x)
    for i in range(len(x)):
        if 0 <= i + offset < len(x):
            out[i] = x[i + offset]
    return out


def window(token, grid, kernel):
    reach = range(token - kernel // 2, token + kernel // 2 + 1)
    return {divmod(index - 1, grid) for index in reach if 1 <= index <= grid**2}


def window_on_the_grid(token, grid, kernel):
    row, col = divmod(token - 1, grid)
    half = kernel // 2
    return [(r, c) for r in range(row - half, row + half + 1) for c in range(col - half, col + half + 1)
            if 0 <= r < grid and 0 <= c < grid]


def mixed_label(labels, box, grid, share=None):
    row0, col0, row1, col1 = box
    share = (row1 - row0) * (col1 - col0) / grid**2 if share is None else share
    return (1 - share) * labels + share * labels.flip(0)


def mirror_overlap(box, clamp=True, union=True):
    x1, y1, x2, y2 = box.tolist()
    side = min(x2, y2) - max(x1, y1)
    met = max(side, 0) ** 2 if clamp else side**2
    return met / (2 * (x2 - x1) * (y2 - y1) - (met if union else 0))


def spread_out(logits, ids, count):
    return torch.zeros(logits.shape[0], count, *logits.shape[2:]).scatter(1, ids, logits)


def schedule(step, warmup, total):
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * step / total)) / 2


RIGHT = {
    "attention": lambda q, k, v: (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v,
    "split_heads": lambda x, heads: x.unflatten(2, (heads, -1)).transpose(1, 2),
    "map_similarity": similarity,
    "expand": lambda maps, weight: torch.einsum("eh,bhij->beij", weight, maps),
    "parameters": parameters,
    "collapse": lambda expansion, reduction: reduction @ expansion,
    "convolve": lambda maps, kernels: F.conv2d(maps, kernels[:, None], padding=kernels.shape[1] // 2,
                                              groups=len(kernels)),
    "shift_rows": shift,
    "effective_window": window,
    "spread_out": spread_out,
    "compose": lambda outer, inner: outer[:2].repeat(2) + inner * (outer[2:] - outer[:2]).repeat(2),
    "mirror_overlap": mirror_overlap,
    "mixed_label": mixed_label,
    "schedule": schedule,
    "average": lambda old, weights, decay: decay * old + (1 - decay) * weights,
    "drop_rates": lambda depth, last: [last * index / (depth - 1) for index in range(depth)],
}
WRONG = [
    ("attention", lambda q, k, v: (q @ k.T).softmax(dim=1) @ v, "not divided by the root"),
    ("attention", lambda q, k, v: (q @ k.T / 2).softmax(dim=0) @ v, "runs over the queries"),
    ("attention", lambda q, k, v: q @ k.T / 2 @ v, "there is no softmax"),
    ("split_heads", lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1), "a reshape straight to"),
    ("split_heads", lambda x, heads: x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2), "split C into .H, C/H."),
    ("split_heads", lambda x, heads: x, "the shape .2, 5, 12., not .2, 3, 5, 4."),
    ("split_heads", lambda x, heads: None, "does it end with a return"),
    ("split_heads", lambda x, heads: 3, "returned 3, not a tensor"),
    ("map_similarity", lambda maps: (F.normalize(maps.flatten(2), dim=2) @ F.normalize(
        maps.flatten(2), dim=2).transpose(1, 2)).mean(), "compared with itself"),
    ("map_similarity", lambda maps: torch.tensor(0.5), "its numbers differ"),
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->beji", weight, maps), "changed places"),
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->beij", weight.softmax(1), maps), "free numbers"),
    ("parameters", lambda h, r, k: 2 * r * h * h + r * h * k**2, "the BatchNorms are missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - 2 * h, "after the skip is missing"),
    ("collapse", lambda expansion, reduction: (reduction @ expansion).T, "transposed"),
    ("collapse", lambda expansion, reduction: expansion @ reduction, "what is applied first stands on the right"),
    ("collapse", lambda expansion, reduction: expansion.T + reduction, "the two are added"),
    ("collapse", lambda expansion, reduction: expansion, "the shape .8, 4., not .4, 4."),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[:1, None].expand(3, -1, -1, -1), padding=2, groups=3),
     "the kernel of the first"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels.flip(1, 2)[:, None], padding=2, groups=3),
     "turned round"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[:, None], padding=1, groups=3), "the shape .2, 3, 5, 5."),
    ("shift_rows", lambda x, offset: shift(x, -offset), "with offset -1, the rows are moved the other way"),
    ("shift_rows", lambda x, offset: x.roll(-offset, 0), "come back at the other"),
    ("effective_window", window_on_the_grid, "a window on the grid"),
    ("effective_window", lambda token, grid, kernel: {place for place in window(token, grid, kernel)
                                                      if place[0] == (token - 1) // grid}, "a row's end is no wall"),
    ("effective_window", lambda token, grid, kernel: [], "for token 6 of a grid of 4"),
    ("effective_window", lambda token, grid, kernel: [divmod(index - 1, grid) for index in range(
        token - kernel // 2, token + kernel // 2 + 1) if index <= grid**2], "token 0 is the class token"),
    ("spread_out", lambda logits, ids, count: spread_out(logits, ids, count).softmax(dim=1), "a softmax already"),
    ("spread_out", lambda logits, ids, count: F.pad(logits, (0, 0, 0, 0, 0, 3)), "in the order of their rank"),
    ("compose", lambda outer, inner: inner * (outer[2:] - outer[:2]).repeat(2), "scaled but not moved"),
    ("compose", lambda outer, inner: outer * inner, "multiplied"),
    ("mirror_overlap", lambda box: mirror_overlap(box, clamp=False), "do not meet"),
    ("mirror_overlap", lambda box: mirror_overlap(box, union=False), "is no union"),
    ("mixed_label", lambda labels, box, grid: mixed_label(labels, box, grid, 1 - 6 / 16), "own and partner"),
    ("mixed_label", lambda labels, box, grid: labels, "are not mixed"),
    ("schedule", lambda step, warmup, total: (step + 1) / (warmup + 1) if step < warmup else schedule(
        step, warmup, total), "the warm-up begins at 0"),
    ("schedule", lambda step, warmup, total: step / warmup if step < warmup else (
        1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2, "not from the end of the warm-up"),
    ("schedule", lambda step, warmup, total: (1 + math.cos(math.pi * step / total)) / 2, "no warm-up"),
    ("average", lambda old, weights, decay: (1 - decay) * old + decay * weights, "changed places"),
    ("average", lambda old, weights, decay: (old + weights) / 2, "a plain mean"),
    ("drop_rates", lambda depth, last: last, "not a list of rates"),
    ("effective_window", lambda token, grid, kernel: [1, 2], "not a set of .row, col."),
    ("attention", lambda q, k, v: v > 0, "its numbers differ"),
    ("drop_rates", lambda depth, last: [last] * depth, "every block has the same rate"),
    ("drop_rates", lambda depth, last: [last * index / depth for index in range(depth)], "does not reach the rate"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_taken(name, capsys):
    getattr(exercises, f"check_{name}")(RIGHT[name])
    assert capsys.readouterr().out == "right\n"


def test_an_answer_may_work_in_place(capsys):
    exercises.check_average(lambda old, weights, decay: old.mul_(decay).add_(weights, alpha=1 - decay))
    exercises.check_mixed_label(lambda labels, box, grid: labels.copy_(mixed_label(labels, box, grid)))
    assert capsys.readouterr().out == "right\nright\n"


@pytest.mark.parametrize("name, answer, message", WRONG)
def test_a_wrong_answer_is_told_its_fault(name, answer, message):
    with pytest.raises(WrongAnswer, match=message):
        getattr(exercises, f"check_{name}")(answer)


def test_every_check_has_two_wrong_answers():
    checks = {name.removeprefix("check_") for name in dir(exercises) if name.startswith("check_")}
    assert checks == set(RIGHT)
    assert all(sum(name == wrong for wrong, *_ in WRONG) >= 2 for name in checks)


def test_a_solution_takes_the_place_of_an_empty_stub_only():
    def empty(x):
        """Your turn."""
        ...

    def answered(x):
        return x + 1

    def begun(x):
        return ...

    def solution(x):
        return x + 2

    assert exercises.solution_of(empty)(solution) is solution
    assert exercises.solution_of(answered)(solution) is answered
    assert exercises.solution_of(begun)(solution) is begun


def test_a_fault_is_shown_without_a_traceback():
    assert WrongAnswer("it is transposed")._render_traceback_() == ["not yet: it is transposed"]
