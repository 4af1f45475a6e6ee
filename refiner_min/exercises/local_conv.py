"""The checks of notebooks/03_local_conv.ipynb."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from refiner_min.exercises import WrongAnswer, answer, answer_leaving, compare_quietly, random, said_with
from refiner_min.model import Attention, Refinement, RefinerConfig

# ----------------------------------------------------------------------------------------------------------------------
# I. The theorem


def check_convolve(convolve):
    """convolve(maps, kernels): (B, H, N, N) and (H, k, k) -> (B, H, N, N)."""
    for batch, heads, tokens, k, dtype in ((2, 3, 7, 5, torch.float32), (3, 2, 8, 3, torch.float64)):
        maps = random(batch, heads, tokens, tokens).softmax(dim=3).to(dtype)
        kernels = random(heads, k, k, seed=1).to(dtype)

        def by(kernels, maps=maps, k=k):
            return F.conv2d(maps, kernels[:, None], padding=k // 2, groups=maps.shape[1])

        aside = F.pad(maps, (k // 2 + 1, k // 2 - 1, k // 2, k // 2))
        found = answer_leaving(convolve, maps, kernels)
        compare_quietly(found, by(kernels), {
            "every head is convolved with the kernel of the first": by(kernels[:1].expand_as(kernels)),
            "the heads are mixed: a kernel a head means groups=H":
                F.conv2d(maps, kernels[None].expand(heads, -1, -1, -1), padding=k // 2),
            "the kernel is turned round: deep learning's convolution is a correlation": by(kernels.flip(1, 2)),
            "the kernel is transposed: its rows run along the queries, its columns along the keys": by(kernels.mT),
            "the maps have shrunk: pad by k // 2": F.conv2d(maps, kernels[:, None], groups=heads),
            "the maps have grown: pad by k // 2, not by k":
                F.conv2d(maps, kernels[:, None], padding=k, groups=heads),
            "the map is off by one column: pad alike on both sides":
                F.conv2d(aside, kernels[:, None], groups=heads),
            "the weighted entries are averaged: add them up, do not divide by k * k": by(kernels) / k**2,
        })
        if found.dtype != dtype:
            raise WrongAnswer(f"it returned {found.dtype} for maps of {dtype}: the theorem is checked in their format")
    print("right")


def check_shift_rows(shift):
    """shift(x, offset): (N, D) -> the matrix whose row i is row i + offset, zero where there is none."""
    values = torch.arange(1.0, 16).reshape(5, 3)

    def moved(x, offset, dim=0, end="zero"):
        size = x.shape[dim]
        index = torch.arange(size) + offset
        keep = (index >= 0) & (index < size)
        index = index % size if end == "wrap" else index.clamp(0, size - 1)
        chosen = x.index_select(dim, index)
        return chosen if end in ("wrap", "repeat") else chosen * (keep[:, None] if dim == 0 else keep)

    def case(offset):
        left = values[max(offset, 0):5 + min(offset, 0)]
        compare_quietly(answer_leaving(shift, values, offset), moved(values, offset), {
            "the rows stay where they were": values,
            "the rows are moved the other way": moved(values, -offset),
            "columns are moved, not rows": moved(values, offset, dim=1),
            "rows that leave at one end come back at the other, where there must be zeros":
                moved(values, offset, end="wrap"),
            "the last row is repeated where there must be zeros": moved(values, offset, end="repeat"),
            "the rows without a source are left out: they must be there, as zeros": left,
            "all is zero: a slice that ends at -0 is empty, and one that starts there is everything":
                torch.zeros_like(values),
            "it is off by one: row i is row i + offset": moved(values, offset + 1),
        })

    for offset in (0, -1, 2, 7):  # at 7 every row comes from outside
        said_with(f"with offset {offset}, ", case, offset)
    if answer_leaving(shift, values.double(), 1).dtype != torch.float64:
        raise WrongAnswer("of float64 it makes another type: torch.zeros_like(x) keeps it")
    print("right")


def by_index(token, grid, kernel):
    reach = range(token - kernel // 2, token + kernel // 2 + 1)
    return {((index - 1) // grid, (index - 1) % grid) for index in reach if 1 <= index <= grid * grid}


def around(token, grid, kernel):
    row, col = (token - 1) // grid, (token - 1) % grid
    half = kernel // 2
    return {(r, c) for r in range(row - half, row + half + 1) for c in range(col - half, col + half + 1)
            if 0 <= r < grid and 0 <= c < grid}


def check_effective_window(window):
    """window(token, grid, kernel): the patches that a k x k kernel joins with a patch, as (row, col) on the grid."""
    for token, grid, kernel in ((6, 4, 3), (4, 4, 3), (1, 4, 3), (16, 4, 5), (12, 5, 7), (3, 4, 9)):
        right = by_index(token, grid, kernel)
        places = answer(window, token, grid, kernel)
        try:
            found = {(int(row), int(col)) for row, col in places}
        except (TypeError, ValueError):
            raise WrongAnswer(f"it returned {places!r}, not a set of (row, col)") from None
        line = (token - 1) // grid
        for sentence, wrong in {
            "that is a window on the grid; the kernel runs along the row of tokens only": around(token, grid, kernel),
            "a row's end is no wall: its right neighbour is the first patch of the next row":
                {place for place in right if place[0] == line},
            "row and column have changed places": {(col, row) for row, col in right},
            "it is off by one: token t is patch t - 1, since token 0 is the class token":
                by_index(token + 1, grid, kernel) | ({(grid, 0)} if token == grid * grid else set()),
            "a kernel of k reaches k // 2 to each side, not k": by_index(token, grid, 2 * kernel + 1),
            "the token itself is missing": right - {((token - 1) // grid, (token - 1) % grid)},
            "row -1 is not on the grid: token 0 is the class token; leave it out": right | {(-1, grid - 1)},
        }.items():
            if found != right and found == wrong:
                raise WrongAnswer(sentence)
        if any(not (0 <= row < grid and 0 <= col < grid) for row, col in found):
            raise WrongAnswer(f"for token {token} of a grid of {grid} it gives places that are not on the grid: "
                              f"{sorted(found)}")
        if found != right:
            raise WrongAnswer(f"for token {token} of a grid of {grid} with a kernel of {kernel} it gives "
                              f"{sorted(found)}, not {sorted(right)}")
    print("right")


def check_convolve_keys(convolve_keys):
    """convolve_keys(maps, kernels, grid): (B, H, N, N), (H, k, k) and the grid's side, N = grid * grid + 1 -> maps
    (B, H, N, N) in which every query's row, without the class token's column, is convolved as a picture."""
    for batch, heads, grid, k, dtype in ((2, 3, 4, 3, torch.float32), (3, 2, 5, 3, torch.float64),
                                         (1, 2, 4, 5, torch.float32)):
        maps = random(batch, heads, grid * grid + 1, grid * grid + 1).softmax(dim=3).to(dtype)
        kernels = random(heads, k, k, seed=1).to(dtype)
        right = on_the_grid(maps, kernels, grid)
        bare = right[..., 1:]
        flat = F.conv2d(maps, kernels[:, None], padding=k // 2, groups=heads)
        compare_quietly(answer_leaving(convolve_keys, maps, kernels, grid), right, {
            "the class token's column is missing: put it back in front": bare,
            "the class token's column is zero: it stays as it is":
                torch.cat([torch.zeros_like(maps[..., :1]), bare], dim=3),
            "the class token's row stayed as it was: its queries look at the grid too":
                torch.cat([maps[:, :, :1], right[:, :, 1:]], dim=2),
            "the class token's column stands last: it belongs in front": right.roll(-1, 3),
            "the map itself is convolved, along the row of tokens: lay each query's row out as a grid first": flat,
            "queries are laid out on the grid, not keys": on_the_grid(maps.mT, kernels, grid).mT,
            "every head is convolved with the kernel of the first":
                on_the_grid(maps, kernels[:1].expand_as(kernels), grid),
            "the kernel is turned round: deep learning's convolution is a correlation":
                on_the_grid(maps, kernels.flip(1, 2), grid),
            "the kernel is transposed, or the grid is laid out column by column":
                on_the_grid(maps, kernels.mT, grid),
            "only the kernel's middle row was used: patches above and below count too":
                on_the_grid(maps, one_line(kernels, 1), grid),
            "only the kernel's middle column was used: patches to the left and right count too":
                on_the_grid(maps, one_line(kernels, 2), grid),
            "queries and heads are mixed up: move the axes (permute or transpose) before they are joined":
                mixed_up(maps, kernels, grid),
        })
    print("right")


def on_the_grid(maps, kernels, grid):
    """By loops over the grid and over the kernel."""
    half, out = kernels.shape[1] // 2, maps.clone()
    for row in range(grid):
        for col in range(grid):
            total = torch.zeros_like(maps[..., 0])  # (B, H, N)
            for a in range(-half, half + 1):
                for b in range(-half, half + 1):
                    if 0 <= row + a < grid and 0 <= col + b < grid:
                        key = 1 + (row + a) * grid + col + b
                        total += kernels[:, half + a, half + b, None] * maps[..., key]
            out[..., 1 + row * grid + col] = total
    return out


def one_line(kernels, dim: int):
    """The kernels with nothing but their middle row (dim 1) or column (dim 2)."""
    middle = torch.zeros(kernels.shape[1]).to(kernels)
    middle[len(middle) // 2] = 1
    return kernels * (middle[:, None] if dim == 1 else middle)


def mixed_up(maps, kernels, grid):
    """What comes out where (B, H, N) are reshaped to (B * N, H) without being moved."""
    batch, heads, tokens, _ = maps.shape
    pictures = maps[..., 1:].reshape(batch * tokens, heads, grid, grid)
    pictures = F.conv2d(pictures, kernels[:, None], padding=kernels.shape[1] // 2, groups=heads)
    return torch.cat([maps[..., :1], pictures.reshape(batch, heads, tokens, -1)], dim=3)


# ----------------------------------------------------------------------------------------------------------------------
# II. The model: the package's class, and beside it a class of its own with the reader's forward and the same weights


def beside(theirs: nn.Module, forward) -> nn.Module:
    """A module with the reader's forward, and the state of theirs; the package's class stays as it is."""
    ours = copy.deepcopy(theirs)
    ours.__class__ = type("Yours", (type(theirs),), {"forward": forward})
    ours.load_state_dict(theirs.state_dict())
    return ours


def with_random_state(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter and every statistic of BatchNorm as after some training."""
    with torch.no_grad():
        for index, (name, value) in enumerate(module.state_dict().items()):
            if value.is_floating_point():
                noise = random(*value.shape, seed=seed + index) / 3
                value.copy_(1 + noise.abs() if name.endswith("var") or value.ndim == 1 and "weight" in name else noise)
    return module


def check_refinement_forward(forward):
    """forward(self, maps) of Refinement: (B, H, N, N) -> (B, H, N, N), in both forms."""
    for words, training, fields in (
        ("", True, {}), ("in evaluation, ", False, {"expand": 2}), ("without expansion, ", True, {"expand": 1}),
        ("in the linear form, ", True, {"linear": True}),
        ("in the linear form, ", False, {"linear": True, "expand": 1}),
    ):
        config = RefinerConfig(heads=3, dim=48, share=False, **fields)
        theirs = with_random_state(Refinement(config, scale=0.4), seed=1).train(training)
        maps = random(2, 3, 7, 7, seed=2).softmax(dim=3)
        said_with(words, compare_refinements, theirs, beside(theirs, forward), maps)
    print("right")


@torch.no_grad()
def compare_refinements(theirs, yours, maps):
    right = copy.deepcopy(theirs)(maps)
    branch = theirs.reduce(theirs.convolve(theirs.expand(maps)))
    try:
        found = answer_leaving(yours, maps)
    except TypeError as error:
        if theirs.norm is None and "NoneType" in str(error):
            raise WrongAnswer("self.norm is None: there is neither a norm nor a skip nor a scale") from None
        raise
    if theirs.norm is None:
        compare_quietly(found, right, {"there is no skip: what is reduced is the refined map": maps + branch,
                                       "there is no scale: what is reduced is the refined map": theirs.scale * branch})
        return
    norm, scale = theirs.norm, theirs.scale
    short = {} if isinstance(theirs.expand, nn.Identity) else {
        "the convolution is left out": scale * norm(maps + theirs.reduce(theirs.expand(maps)))}
    compare_quietly(found, right, {
        "the skip is missing: the maps that come in are added to what is reduced": scale * norm(branch),
        "the scale is missing, or comes before the last norm, which takes it out again: multiply the result by it":
            norm(maps + branch),
        "the skip comes too late: the maps are added before the last norm, not after it": maps + scale * norm(branch),
        "the skip comes too late: it is added before the last norm, and scaled with it": scale * (maps + norm(branch)),
        "the last norm is missing": scale * (maps + branch),
        "only the branch is scaled: the scale comes after the last norm": norm(maps + scale * branch),
        "the last norm, the skip and the scale are missing": branch,
        **short,
    })


def check_pair_forward(forward):
    """forward(self, x, handed) of Attention: tokens (B, N, C) and a map or None -> what is added to the tokens, and
    the map that is handed on, or None."""
    handed, x = random(2, 3, 7, 7, seed=4).softmax(dim=3), random(2, 7, 12, seed=5)
    for words, fields, own, refined, given in (
        ("in the first block, ", {}, True, False, None),
        ("in a block that takes its map, ", {}, False, True, handed),
        ("in the first block of the second pair, ", {}, True, False, handed),
        ("with unrefined=True, in a block that takes its map, ", {"unrefined": True}, False, False, handed),
        ("with share=False, ", {"share": False}, True, True, handed),
        ("in a plain model, ", {"refine": False}, True, False, None),
        ("in the linear form, ", {"share": False, "linear": True}, True, True, None),
    ):
        theirs = with_random_state(Attention(RefinerConfig(dim=12, heads=3, **fields), own, refined), seed=1)
        said_with(words, compare_attentions, theirs, beside(theirs, forward), x, given)
    print("right")


@torch.no_grad()
def compare_attentions(theirs, yours, x, handed):
    right, right_map = copy.deepcopy(theirs)(x, handed)
    try:
        found = answer_leaving(yours, x, handed)
    except TypeError as error:
        if theirs.refinement is None and "'NoneType' object is not callable" in str(error):
            raise WrongAnswer("self.refinement is None: the map stays as it is") from None
        raise
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise WrongAnswer("it must return two things: what is added to the tokens, and the map that is handed on")
    raw, v = theirs.raw_map_and_values(x, handed)
    refined = raw if theirs.refinement is None else theirs.refinement(raw)
    one = theirs.proj((refined @ v).transpose(1, 2).flatten(2))
    compare_quietly(found[0], right, {
        "the values are gathered with the map before its refinement":
            theirs.proj((raw @ v).transpose(1, 2).flatten(2)),
        "the last linear layer, self.proj, is missing": (refined @ v).transpose(1, 2).flatten(2),
        "the heads are not put together: transpose to (B, N, H, C/H) before you flatten":
            theirs.proj((refined @ v).reshape(x.shape)),
        "the channels of the heads are interleaved: each head's C/H channels stay together":
            theirs.proj((refined @ v).permute(0, 2, 3, 1).flatten(2)),
        "the map is transposed: its rows are the queries": theirs.proj((refined.mT @ v).transpose(1, 2).flatten(2)),
        "the tokens are added already: the block does that": x + one,
    })
    config, passed = theirs.config, found[1]
    if right_map is None:
        if passed is not None:
            raise WrongAnswer("a map is handed on where there must be None")
    elif passed is None:
        raise WrongAnswer("no map is handed on: a pair's second block, or the next pair, needs it")
    else:
        compare_quietly(passed, right_map, {
            "the refined map is handed on: a pair hands on the map before its refinement": refined if config.share
            else torch.empty(0),
            "the map before its refinement is handed on: with share=False it is the refined one": raw,
            "the map that was handed to it is handed on: it is the block's own": torch.empty(0) if handed is None
            else handed,
        })


def check_swap_tokens(swap):
    """swap(tokens, box): (B, N-1, C) and (row0, col0, row1, col1), half open -> (B, N-1, C)."""
    for batch, side, box in ((4, 7, (2, 1, 4, 5)), (3, 4, (0, 1, 1, 4)), (2, 4, (2, 1, 2, 3))):
        tokens = random(batch, side * side, 2)
        on_grid = tokens.unflatten(1, (side, side))  # (B, side, side, C)

        def swapped(box, other, on_grid=on_grid, outside=False):
            row0, col0, row1, col1 = box
            base, other = (other, on_grid) if outside else (on_grid, other)
            out = base.clone()
            out[:, row0:row1, col0:col1] = other[:, row0:row1, col0:col1]
            return out.flatten(1, 2)

        row0, col0, row1, col1 = box
        in_place = on_grid.clone()
        for index in range(batch):
            in_place[index, row0:row1, col0:col1] = in_place[batch - 1 - index, row0:row1, col0:col1]
        compare_quietly(answer_leaving(swap, tokens, box), swapped(box, on_grid.flip(0)), {
            "nothing is swapped": tokens,
            "rows and columns of the box have changed places": swapped((col0, row0, col1, row1), on_grid.flip(0)),
            "the box is taken with its last row and column: it is half open, without row1 and col1":
                swapped((row0, col0, row1 + 1, col1 + 1), on_grid.flip(0)),
            "the box is taken as (row, col, height, width): its third and fourth numbers are an end":
                swapped((row0, col0, row0 + row1, col0 + col1), on_grid.flip(0)),
            "the tokens are reversed, not the batch: flip(0)": swapped(box, tokens.flip(1).unflatten(1, (side, side))),
            "the partner is the next picture: it is the one at the other end of the batch, flip(0)":
                swapped(box, on_grid.roll(1, 0)),
            "the partner is the picture before: it is the one at the other end of the batch, flip(0)":
                swapped(box, on_grid.roll(-1, 0)),
            "the tokens outside the box are swapped, not those inside":
                swapped(box, on_grid.flip(0), outside=True),
            "whole pictures are swapped, not the box's tokens": tokens.flip(0),
            "half of the batch got its own tokens back: keep the batch as it was until all are swapped":
                in_place.flatten(1, 2),
            "the result is on the grid: flatten it to (B, N-1, C) again": swapped(box, on_grid.flip(0)).unflatten(
                1, (side, side)),
        })
    print("right")
