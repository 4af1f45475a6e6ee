import torch
import torch.nn.functional as F


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


RIGHT = {
    "convolve": [lambda maps, kernels: F.conv2d(maps, kernels[:, None], padding=kernels.shape[1] // 2,
                                              groups=len(kernels))],
    "shift_rows": [shift],
    "effective_window": [window],
}
WRONG = [
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
    ("effective_window", lambda token, grid, kernel: [1, 2], "not a set of .row, col."),
]
