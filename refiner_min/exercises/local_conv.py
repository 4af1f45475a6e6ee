"""The checks of notebooks/03_local_conv.ipynb."""

import torch
import torch.nn.functional as F

from refiner_min.exercises import WrongAnswer, answer, compare, compare_quietly, random


def check_convolve(convolve):
    """convolve(maps, kernels): (B, H, N, N) and (H, k, k) -> (B, H, N, N)."""
    maps, kernels = random(2, 3, 7, 7).softmax(dim=3), random(3, 5, 5, seed=1)
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
