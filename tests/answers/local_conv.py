import torch
import torch.nn.functional as F

from refiner_min.model import swap_tokens


def convolve(maps, kernels):
    return F.conv2d(maps, kernels[:, None], padding=kernels.shape[1] // 2, groups=len(kernels))


def convolve_by_loops(maps, kernels):
    half, n = kernels.shape[1] // 2, maps.shape[3]
    padded, out = F.pad(maps, (half, half, half, half)), torch.zeros_like(maps)
    for a in range(kernels.shape[1]):
        for b in range(kernels.shape[1]):
            out = out + kernels[None, :, a, b, None, None] * padded[:, :, a:a + n, b:b + n]
    return out


def convolve_in_place(maps, kernels):
    maps *= 2
    return convolve(maps, kernels) / 2


def to_the_right(maps, kernels):
    half = kernels.shape[1] // 2
    return F.conv2d(F.pad(maps, (half + 1, half - 1, half, half)), kernels[:, None], groups=len(kernels))


def shift(x, offset):
    out = torch.zeros_like(x)
    for i in range(len(x)):
        if 0 <= i + offset < len(x):
            out[i] = x[i + offset]
    return out


def shift_by_a_matrix(x, offset):
    return torch.diag(torch.ones(max(len(x) - abs(offset), 0)), offset)[:len(x), :len(x)].to(x) @ x if abs(
        offset) < len(x) else torch.zeros_like(x)


def shift_in_place(x, offset):
    rolled = x.roll(-offset, 0)
    for i in range(len(x)):
        x[i] = rolled[i] if 0 <= i + offset < len(x) else 0
    return x


def shift_and_clear(x, offset):
    out = x.roll(-offset, 0)
    if offset < 0:
        out[:-offset] = 0
    else:
        out[-offset:] = 0  # everything where offset is 0
    return out


def window(token, grid, kernel):
    reach = range(token - kernel // 2, token + kernel // 2 + 1)
    return {divmod(index - 1, grid) for index in reach if 1 <= index <= grid**2}


def window_on_the_grid(token, grid, kernel):
    row, col = divmod(token - 1, grid)
    half = kernel // 2
    return [(r, c) for r in range(row - half, row + half + 1) for c in range(col - half, col + half + 1)
            if 0 <= r < grid and 0 <= c < grid]


def unbounded_window(token, grid, kernel):
    return [divmod(index - 1, grid) for index in range(token - kernel // 2, token + kernel // 2 + 1) if index >= 1]


def convolve_keys(maps, kernels, grid):
    pictures = maps[..., 1:].unflatten(3, (grid, grid))
    half = kernels.shape[1] // 2
    pictures = F.conv3d(pictures, kernels[:, None, None], padding=(0, half, half), groups=len(kernels))
    return torch.cat([maps[..., :1], pictures.flatten(3)], dim=3)


def convolve_keys_in_2d(maps, kernels, grid):
    pictures = maps[..., 1:].transpose(1, 2).flatten(0, 1).unflatten(2, (grid, grid))  # (B * N, H, grid, grid)
    pictures = convolve(pictures, kernels).flatten(2).unflatten(0, (len(maps), -1)).transpose(1, 2)
    return torch.cat([maps[..., :1], pictures], dim=3)


def convolve_keys_on_a_copy(maps, kernels, grid):
    out = maps.clone()
    out[..., 1:] = convolve_keys_in_2d(maps, kernels, grid)[..., 1:]
    return out


def convolve_keys_in_place(maps, kernels, grid):
    maps[..., 1:] = convolve_keys(maps, kernels, grid)[..., 1:]
    return maps


def mixed_up(maps, kernels, grid):
    pictures = maps[..., 1:].reshape(-1, maps.shape[1], grid, grid)
    return torch.cat([maps[..., :1], convolve(pictures, kernels).reshape(maps[..., 1:].shape)], dim=3)


def refine(self, maps):
    reduced = self.reduce(self.convolve(self.expand(maps)))
    return reduced if self.norm is None else self.scale * self.norm(maps + reduced)


def refine_in_another_order(self, maps):
    x = maps
    for stage in (self.expand, self.convolve, self.reduce):
        x = stage(x)
    if self.norm:
        x = self.norm(x + maps) * self.scale
    return x


def refine_in_place(self, maps):
    reduced = self.reduce(self.convolve(self.expand(maps)))
    if self.norm is None:
        return reduced
    maps += reduced
    return self.scale * self.norm(maps)


def published_only(formula):
    """The formula where there is a norm, and the right answer where there is none."""
    def forward(self, maps):
        if self.norm is None:
            return refine(self, maps)
        return formula(self, maps, self.reduce(self.convolve(self.expand(maps))))

    return forward


def linear_too(formula):
    def forward(self, maps):
        return formula(self, maps) if self.norm is None else refine(self, maps)

    return forward


def attend(self, x, handed=None):
    raw, v = self.raw_map_and_values(x, handed)
    refined = raw if self.refinement is None else self.refinement(raw)
    x = self.proj((refined @ v).transpose(1, 2).flatten(2))
    if self.config.linear or not self.config.refine:
        return x, None
    return x, raw if self.config.share else refined


def attend_by_einsum(self, x, handed=None):
    raw, v = self.raw_map_and_values(x, handed)
    refined = self.refinement(raw) if self.refinement else raw
    x = self.proj(torch.einsum("bhij,bhjc->bihc", refined, v).reshape(x.shape))
    passed = raw if self.config.share else refined
    return [x, None if self.config.linear or not self.config.refine else passed]


def attending(merge=None, raw_gathers=False, no_proj=False, adds=False, passes=None, changes=False):
    """attend with a fault. merge(gathered): heads to tokens; passes(self, raw, refined, handed): what is handed on."""
    def forward(self, x, handed=None):
        raw, v = self.raw_map_and_values(x, handed)
        refined = raw if self.refinement is None else self.refinement(raw)
        gathered = (raw if raw_gathers else refined) @ v
        y = gathered.transpose(1, 2).flatten(2) if merge is None else merge(gathered, refined, v)
        y = y if no_proj else self.proj(y)
        if changes and handed is not None:
            handed *= self.scale
        return (x + y if adds else y), attend(self, x, handed)[1] if passes is None else passes(
            self, raw, refined, handed)

    return forward


def always_refined(self, x, handed=None):
    """Where a block takes its map."""
    raw, v = self.raw_map_and_values(x, handed)
    refined = raw if self.own and (self.config.share or not self.config.refine) else self.refinement(raw)
    x = self.proj((refined @ v).transpose(1, 2).flatten(2))
    return x, None if self.config.linear or not self.config.refine else raw if self.config.share else refined


def passed_on(only_if):
    """Hands on the map before its refinement wherever only_if(config)."""
    return attending(passes=lambda self, raw, refined, handed: raw if only_if(self.config) else None)


def swap(tokens, box):
    side = round(tokens.shape[1] ** 0.5)
    row0, col0, row1, col1 = box
    on_grid = tokens.unflatten(1, (side, side)).clone()
    on_grid[:, row0:row1, col0:col1] = tokens.flip(0).unflatten(1, (side, side))[:, row0:row1, col0:col1]
    return on_grid.flatten(1, 2)


def swap_by_loops(tokens, box):
    side, out = round(tokens.shape[1] ** 0.5), tokens.clone()
    for image in range(len(tokens)):
        for row in range(box[0], box[2]):
            for col in range(box[1], box[3]):
                out[image, row * side + col] = tokens[len(tokens) - 1 - image, row * side + col]
    return out


def swap_in_order(tokens, box):
    side, out = round(tokens.shape[1] ** 0.5), tokens.clone()
    row0, col0, row1, col1 = box
    on_grid = out.view(len(out), side, side, -1)
    for image in range(len(tokens)):
        on_grid[image, row0:row1, col0:col1] = on_grid[len(tokens) - 1 - image, row0:row1, col0:col1]
    return out


def swap_in_place(tokens, box):
    tokens.copy_(swap(tokens, box))
    return tokens


def swap_with(partner):
    """swap, but the box's tokens come from partner(tokens)."""
    def function(tokens, box):
        inside = swap(torch.stack([torch.zeros(tokens.shape[1:]), torch.ones(tokens.shape[1:])]), box)[0].bool()
        return torch.where(inside, partner(tokens), tokens)

    return function


def outside(tokens, box):
    return torch.where(swap(tokens, box) == tokens, tokens.flip(0), tokens)


RIGHT = {
    "convolve": [convolve, convolve_by_loops,
                 lambda maps, kernels: F.conv2d(maps, kernels.unsqueeze(1), padding="same", groups=maps.shape[1])],
    "shift_rows": [shift, shift_by_a_matrix],
    "effective_window": [window, lambda *case: sorted(window(*case)), lambda *case: [list(p) for p in window(*case)],
                         lambda *case: torch.tensor(sorted(window(*case)))],
    "convolve_keys": [convolve_keys, convolve_keys_in_2d, convolve_keys_on_a_copy],
    "refinement_forward": [refine, refine_in_another_order],
    "pair_forward": [attend, attend_by_einsum],
    "swap_tokens": [swap, swap_by_loops, swap_tokens, swap_with(lambda tokens: tokens.flip(0))],
}
WRONG = [
    ("convolve", lambda maps, kernels: convolve(maps, kernels[:1].expand_as(kernels)), "the kernel of the first"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[None].expand(len(kernels), -1, -1, -1),
                                                padding=kernels.shape[1] // 2), "the heads are mixed"),
    ("convolve", lambda maps, kernels: convolve(maps, kernels.flip(1, 2)), "turned round"),
    ("convolve", lambda maps, kernels: convolve(maps, kernels.mT), "the kernel is transposed"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[:, None], groups=len(kernels)), "the maps have shrunk"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[:, None], padding=kernels.shape[1], groups=len(kernels)),
     "the maps have grown"),
    ("convolve", lambda maps, kernels: F.conv2d(maps, kernels[:, None], padding=1, groups=len(kernels)),
     "the shape .2, 3, 5, 5."),
    ("convolve", to_the_right, "off by one column"),
    ("convolve", lambda maps, kernels: convolve(maps, kernels) / kernels.shape[1] ** 2, "do not divide"),
    ("convolve", lambda maps, kernels: maps, "its numbers differ"),
    ("convolve", lambda maps, kernels: (convolve(maps, kernels),), "a tuple of 1, not one tensor"),
    ("convolve", convolve_in_place, "changes one of its inputs"),
    ("convolve", lambda maps, kernels: convolve(maps, kernels).float(), "it returned torch.float32 for maps of"),
    ("convolve", lambda maps, kernels: None, "it returned nothing"),
    ("shift_rows", lambda x, offset: shift(x, offset).float(), "of float64 it makes another type"),
    ("shift_rows", lambda x, offset: shift(x, -offset), "with offset -1, the rows are moved the other way"),
    ("shift_rows", lambda x, offset: shift(x.T, offset).T, "with offset -1, columns are moved"),
    ("shift_rows", lambda x, offset: x.roll(-offset, 0), "come back at the other"),
    ("shift_rows", lambda x, offset: x[(torch.arange(len(x)) + offset).clamp(0, len(x) - 1)], "the last row is repeat"),
    ("shift_rows", lambda x, offset: x[max(offset, 0):len(x) + min(offset, 0)], "are left out"),
    ("shift_rows", shift_and_clear, "with offset 0, all is zero"),
    ("shift_rows", lambda x, offset: shift(x, offset + 1), "with offset 0, it is off by one"),
    ("shift_rows", shift_in_place, "changes one of its inputs"),
    ("shift_rows", lambda x, offset: x, "with offset -1, the rows stay"),
    ("shift_rows", lambda x, offset: shift(x, offset).tolist(), "not one tensor"),
    ("effective_window", window_on_the_grid, "a window on the grid"),
    ("effective_window", lambda token, grid, kernel: {place for place in window(token, grid, kernel)
                                                      if place[0] == (token - 1) // grid}, "a row's end is no wall"),
    ("effective_window", lambda *case: {(col, row) for row, col in window(*case)}, "row and column have changed"),
    ("effective_window", lambda token, grid, kernel: {divmod(index, grid) for index in range(
        token - kernel // 2, token + kernel // 2 + 1) if index < grid**2}, "token t is patch t - 1"),
    ("effective_window", lambda token, grid, kernel: window(token, grid, 2 * kernel + 1), "not k"),
    ("effective_window", lambda token, grid, kernel: window(token, grid, kernel) - {divmod(token - 1, grid)},
     "the token itself is missing"),
    ("effective_window", lambda token, grid, kernel: [], "for token 6 of a grid of 4"),
    ("effective_window", lambda token, grid, kernel: {(1, 0), (1, 1), (1, 2)}, "for token 4 of a grid of 4"),
    ("effective_window", lambda token, grid, kernel: [divmod(index - 1, grid) for index in range(
        token - kernel // 2, token + kernel // 2 + 1) if index <= grid**2], "token 0 is the class token"),
    ("effective_window", lambda token, grid, kernel: {divmod(index - 1, grid) for index in range(
        token - kernel // 2, token + kernel // 2 + 1) if index != 0 and index <= grid**2}, "are not on the grid"),
    ("effective_window", unbounded_window, "places that are not on the grid"),
    ("effective_window", lambda token, grid, kernel: [1, 2], "not a set of .row, col."),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels, grid)[..., 1:], "column is missing"),
    ("convolve_keys", lambda maps, kernels, grid: F.pad(convolve_keys(maps, kernels, grid)[..., 1:], (1, 0)),
     "column is zero"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels, grid).roll(-1, 3), "stands last"),
    ("convolve_keys", lambda maps, kernels, grid: torch.cat(
        [maps[:, :, :1], convolve_keys(maps, kernels, grid)[:, :, 1:]], dim=2), "the class token's row"),
    ("convolve_keys", lambda maps, kernels, grid: convolve(maps, kernels), "the map itself is convolved"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps.mT, kernels, grid).mT, "not keys"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels[:1].expand_as(kernels), grid),
     "the kernel of the first"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels.flip(1, 2), grid), "turned round"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels.mT, grid), "transposed"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels * torch.eye(kernels.shape[1]).to(
        kernels)[kernels.shape[1] // 2][:, None], grid), "only the kernel's middle row"),
    ("convolve_keys", lambda maps, kernels, grid: convolve_keys(maps, kernels * torch.eye(kernels.shape[1]).to(
        kernels)[kernels.shape[1] // 2], grid), "only the kernel's middle column"),
    ("convolve_keys", mixed_up, "queries and heads are mixed up"),
    ("convolve_keys", convolve_keys_in_place, "changes one of its inputs"),
    ("convolve_keys", lambda maps, kernels, grid: maps, "its numbers differ"),
    ("refinement_forward", published_only(lambda self, maps, x: self.scale * self.norm(x)), "the skip is missing"),
    ("refinement_forward", published_only(lambda self, maps, x: self.norm(maps + x)), "the scale is missing"),
    ("refinement_forward", published_only(lambda self, maps, x: maps + self.scale * self.norm(x)),
     "not after it"),
    ("refinement_forward", published_only(lambda self, maps, x: self.scale * (maps + self.norm(x))), "scaled with it"),
    ("refinement_forward", published_only(lambda self, maps, x: self.scale * (maps + x)), "the last norm is missing"),
    ("refinement_forward", published_only(lambda self, maps, x: self.norm(self.scale * (maps + x))),
     "the scale is missing, or comes before"),
    ("refinement_forward", published_only(lambda self, maps, x: self.norm(maps + self.scale * x)),
     "only the branch is scaled"),
    ("refinement_forward", lambda self, maps: self.reduce(self.convolve(self.expand(maps))),
     "the last norm, the skip and the scale are missing"),
    ("refinement_forward", published_only(lambda self, maps, x: self.scale * self.norm(
        maps + self.reduce(self.expand(maps)))), "the convolution is left out"),
    ("refinement_forward", lambda self, maps: self.scale * self.norm(
        maps + self.reduce(self.convolve(self.expand(maps)))), "in the linear form, self.norm is None"),
    ("refinement_forward", linear_too(lambda self, maps: maps + self.reduce(self.convolve(self.expand(maps)))),
     "in the linear form, there is no skip"),
    ("refinement_forward", linear_too(lambda self, maps: self.scale * self.reduce(self.convolve(self.expand(maps)))),
     "in the linear form, there is no scale"),
    ("refinement_forward", lambda self, maps: (refine(self, maps), maps), "a tuple of 2, not one tensor"),
    ("refinement_forward", refine_in_place, "changes one of its inputs"),
    ("refinement_forward", lambda self, maps: maps, "its numbers differ"),
    ("refinement_forward", lambda self, maps: None, "it returned nothing"),
    ("pair_forward", lambda self, x, handed=None: attend(self, x, handed)[0], "it must return two things"),
    ("pair_forward", attending(raw_gathers=True), "takes its map, the values are gathered with the map before"),
    ("pair_forward", attending(no_proj=True), "self.proj, is missing"),
    ("pair_forward", attending(lambda gathered, refined, v: gathered.reshape(len(v), v.shape[2], -1)),
     "the heads are not put together"),
    ("pair_forward", attending(lambda gathered, refined, v: gathered.permute(0, 2, 3, 1).flatten(2)),
     "interleaved"),
    ("pair_forward", attending(lambda gathered, refined, v: (refined.mT @ v).transpose(1, 2).flatten(2)),
     "the map is transposed"),
    ("pair_forward", attending(adds=True), "the block does that"),
    ("pair_forward", attending(passes=lambda self, raw, refined, handed: refined), "takes its map, the refined"),
    ("pair_forward", attending(passes=lambda self, raw, refined, handed: None), "no map is handed on"),
    ("pair_forward", passed_on(lambda config: True), "with share=False, the map before its refinement"),
    ("pair_forward", attending(passes=lambda self, raw, refined, handed: raw if self.config.share else refined),
     "in a plain model, a map is handed on"),
    ("pair_forward", attending(passes=lambda self, raw, refined, handed: None if not self.config.refine else (
        raw if self.config.share else refined)), "in the linear form, a map is handed on"),
    ("pair_forward", attending(passes=lambda self, raw, refined, handed: raw if handed is None else handed),
     "second pair, the map that was handed to it"),
    ("pair_forward", attending(changes=True), "changes one of its inputs"),
    ("pair_forward", always_refined, "with unrefined=True, .* the map stays as it is"),
    ("pair_forward", lambda self, x, handed=None: (torch.zeros_like(x), handed), "its numbers differ"),
    ("swap_tokens", lambda tokens, box: tokens, "nothing is swapped"),
    ("swap_tokens", lambda tokens, box: swap(tokens, (box[1], box[0], box[3], box[2])), "rows and columns"),
    ("swap_tokens", lambda tokens, box: swap(tokens, (box[0], box[1], box[2] + 1, box[3] + 1)), "half open"),
    ("swap_tokens", lambda tokens, box: swap(tokens, (box[0], box[1], box[0] + box[2], box[1] + box[3])), "an end"),
    ("swap_tokens", swap_with(lambda tokens: tokens.flip(1)), "the tokens are reversed"),
    ("swap_tokens", swap_with(lambda tokens: tokens.roll(1, 0)), "the partner is the next picture"),
    ("swap_tokens", swap_with(lambda tokens: tokens.roll(-1, 0)), "the partner is the picture before"),
    ("swap_tokens", outside, "the tokens outside the box"),
    ("swap_tokens", lambda tokens, box: tokens.flip(0), "whole pictures are swapped"),
    ("swap_tokens", swap_in_order, "its own tokens back"),
    ("swap_tokens", swap_in_place, "changes one of its inputs"),
    ("swap_tokens", lambda tokens, box: swap(tokens, box).unflatten(1, (round(tokens.shape[1] ** 0.5), -1)),
     "the result is on the grid"),
    ("swap_tokens", lambda tokens, box: torch.zeros_like(tokens), "its numbers differ"),
]
