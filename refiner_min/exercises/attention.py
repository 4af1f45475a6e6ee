"""The checks of notebooks/01_attention.ipynb."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from refiner_min.exercises import WrongAnswer, answer_leaving, compare_quietly, number, random


def check_embed(embed):
    """embed(patches, class_token, position): (B, C, grid, grid), (1, 1, C), (1, N, C) -> (B, N, C)."""
    for seed, shape in enumerate([(2, 5, 3, 3), (3, 4, 2, 2)]):
        batch, channels, grid, _ = shape
        patches = random(*shape, seed=seed)
        class_token, position = random(1, 1, channels, seed=7), random(1, grid**2 + 1, channels, seed=8)
        row = patches.flatten(2).transpose(1, 2)  # (B, N-1, C)
        first = class_token.expand(batch, -1, -1)
        bare = torch.cat([first, row], dim=1)
        compare_quietly(answer_leaving(embed, patches, class_token, position), bare + position, {
            "the positions are not added: without them a row of tokens says nothing of where a patch was": bare,
            "the class token has no position: put it in front first, and add the positions to all N tokens":
                torch.cat([first, row + position[:, 1:]], dim=1),
            "the positions are shifted by one: position 0 is the class token's, the patches' begin at 1":
                torch.cat([first, row + position[:, :-1]], dim=1),
            "every token has the same position: add row n of position to token n": bare + position[:, :1],
            "the class token is behind the patches, not in front": torch.cat([row, first], dim=1) + position,
            "the patches are in order of columns; the row of tokens is to go row by row":
                torch.cat([first, patches.transpose(2, 3).flatten(2).transpose(1, 2)], dim=1) + position,
            "a token holds channels of several patches: from (B, C, N-1) to (B, N-1, C) is a transpose, not a reshape":
                torch.cat([first, patches.reshape(batch, grid**2, channels)], dim=1) + position,
            "the class token is missing, there are only N-1 tokens": row + position[:, 1:],
            "the class token is added to every patch; it is a token of its own, in front of them":
                row + class_token + position[:, 1:],
            "tokens and channels have changed places: (B, C, N), not (B, N, C)": (bare + position).transpose(1, 2),
            "the positions are multiplied, not added": bare * position,
        })
    print("right")


def check_attention(attention):
    """attention(q, k, v): (N, d) each -> (N, d)."""
    for seed, (tokens, channels) in enumerate([(5, 4), (3, 7)]):
        q, k, v = (random(tokens, channels, seed=3 * seed + part) for part in range(3))
        products, root = q @ k.T, channels**0.5
        maps = (products / root).softmax(dim=1)  # (N, N)
        compare_quietly(answer_leaving(attention, q, k, v), maps @ v, {
            "the scores are not divided by the root of the number of channels": products.softmax(dim=1) @ v,
            "the scores are divided by the number of channels, not by its root":
                (products / channels).softmax(dim=1) @ v,
            "the scores are multiplied by the root, not divided": (products * root).softmax(dim=1) @ v,
            "the scores are divided by the root of the number of tokens, N; it is that of the channels, d":
                (products / tokens**0.5).softmax(dim=1) @ v,
            "the scores are divided by the number of tokens; it is by the root of that of the channels, d":
                (products / tokens).softmax(dim=1) @ v,
            "the scale comes after the softmax, so the weights do not sum to one: divide the scores":
                products.softmax(dim=1) / root @ v,
            "the softmax runs over the queries (a column); each query's weights, a row, must sum to one":
                (products / root).softmax(dim=0) @ v,
            "queries and keys have changed places": (products / root).T.softmax(dim=1) @ v,
            "the map is transposed when it gathers the values (A.T @ v): row i of A holds the weights of token i":
                maps.T @ v,
            "there is no softmax": products / root @ v,
            "there is neither scale nor softmax": products @ v,
            "the weights gather the keys; they are to gather the values": maps @ k,
            "the scores compare queries with queries, the keys are not used": (q @ q.T / root).softmax(dim=1) @ v,
            "that is the attention map; it has still to gather the values": maps,
            "every token gets the plain mean of the values": v.mean(dim=0).expand_as(v),
            "the exponentials are not divided by their sum": (products / root).exp() @ v,
        })
    print("right")


def check_split_heads(split_heads):
    """split_heads(x, heads): (B, N, C) -> (B, H, N, C/H)."""
    for seed, (shape, heads) in enumerate([((2, 5, 12), 3), ((3, 7, 10), 5)]):
        x, (batch, tokens, channels) = random(*shape, seed=seed), shape
        width = channels // heads
        right = x.unflatten(2, (heads, width)).transpose(1, 2)
        found = answer_leaving(split_heads, x, heads)
        if isinstance(found, tuple | list):
            raise WrongAnswer(f"it returned a {type(found).__name__} of {len(found)}, not one tensor: torch.stack "
                              "makes one of tensors of the same shape")
        compare_quietly(found, right, {
            "the channels of a head are not neighbours: split C into (H, C/H), not into (C/H, H)":
                x.unflatten(2, (width, heads)).permute(0, 3, 1, 2),
            "tokens and channels are mixed up: a reshape straight to (B, H, N, C/H) cuts across tokens; split C first, "
            "then move the heads": x.reshape(batch, heads, tokens, width),
            "the heads stand behind the tokens, (B, N, H, C/H): move them in front of N": right.transpose(1, 2),
            "the heads stand in front of the batch, (H, B, N, C/H)": right.transpose(0, 1),
            "tokens and channels of a head have changed places, (B, H, C/H, N)": right.transpose(2, 3),
            "the first C/H channels are repeated for every head": x[:, None, :, :width].expand(-1, heads, -1, -1),
        })
    print("right")


class Projections(nn.Module):
    """What notebook 1's PlainAttention has, but its forward."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=index) / 2


def attend(module: Projections, x, axis=3, scale=1.0, after=1.0, order=(0, 1, 2), by_heads=False, turned=False):
    """Tokens (B, N, C) -> what the heads gathered, (B, H, N, C/H), and their maps (B, H, N, N); the options are
    mistakes."""
    heads, qkv = module.heads, module.qkv(x)  # (B, N, 3C)
    parts = qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4) if by_heads else (
        qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4))  # (3, B, H, N, C/H)
    q, k, v = (parts[index] for index in order)
    scores = q @ k.transpose(2, 3) * module.scale * scale
    maps = scores if axis is None else scores.softmax(dim=axis) * after
    return (maps.transpose(2, 3) if turned else maps) @ v, maps


@contextmanager
def in_place_told():
    """For an answer that is trained a few cells later."""
    try:
        yield
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise WrongAnswer("it changes a tensor in place that the backward pass needs as it was: compute a new "
                          "tensor") from None


@torch.no_grad()
def check_attention_forward(forward):
    """forward(self, x) of PlainAttention: (B, N, C) -> (B, N, C) and the maps (B, H, N, N)."""
    for seed, (dim, heads, shape) in enumerate([(12, 2, (3, 5, 12)), (15, 5, (2, 4, 15))]):
        module, x = Projections(dim, heads), random(*shape, seed=seed)
        unscaled = 1 / module.scale

        def put_together(gathered, module=module):
            return module.proj(gathered.transpose(1, 2).flatten(2))

        gathered, maps = attend(module, x)
        with torch.enable_grad(), in_place_told():
            found = answer_leaving(lambda given, module=module: forward(module, given), x)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise WrongAnswer("it is to return two things: the tokens (B, N, C) and the maps (B, H, N, N)")
        if all(isinstance(part, torch.Tensor) for part in found) and found[0].shape == maps.shape != x.shape:
            raise WrongAnswer("tokens and maps have changed places: the tokens are returned first")
        mistakes = {
            "the scores are not scaled": dict(scale=unscaled),
            "q and k are each multiplied by the scale, so the scores are by its square: each takes the scale's root":
                dict(scale=module.scale),
            "the scores are divided by the scale; it is 1 / root of C/H already, so multiply": dict(scale=unscaled**2),
            "the scale is that of all C channels; a head has C/H of them, self.scale knows": dict(scale=heads**-0.5),
            "the scale comes after the softmax, so the rows do not sum to one":
                dict(scale=unscaled, after=module.scale),
            "the softmax runs over the queries; a row of the map, over the keys, is to sum to one": dict(axis=2),
            "queries and keys have changed places": dict(order=(1, 0, 2)),
            "the first third of the 3C channels is q, the second k, the last v; here v comes first":
                dict(order=(1, 2, 0)),
            "the 3C channels are first q, k and v, and each of the three is then split into heads; here they are split "
            "into heads first": dict(by_heads=True),
            "the maps are transposed when they gather the values": dict(turned=True),
            "there is no softmax, these are the scores": dict(axis=None),
        }
        compare_quietly(found[1], maps, {sentence: attend(module, x, **mistake)[1] for sentence, mistake in
                                         mistakes.items() if "turned" not in mistake} | {
            "the maps are returned averaged over the heads; leave them (B, H, N, N)": maps.mean(dim=1),
        })
        values = gathered.transpose(1, 2).flatten(2)
        compare_quietly(found[0], put_together(gathered), {
            sentence: put_together(attend(module, x, **mistake)[0]) for sentence, mistake in mistakes.items()} | {
            "the last linear layer, self.proj, is missing": values,
            "the heads are not put side by side: (B, H, N, C/H) is to become (B, N, H, C/H) before the last two are "
            "joined": module.proj(gathered.reshape(*shape)),
            "the channels of the heads are interleaved; head 0's stand first, then head 1's":
                module.proj(gathered.permute(0, 2, 3, 1).flatten(2)),
            "the tokens are added to what was gathered: that is the block's work": x + put_together(gathered),
        })
        if not found[0].requires_grad:
            raise WrongAnswer("no gradient comes through: leave out detach() and torch.no_grad()")
        with torch.enable_grad(), in_place_told():
            found[0].sum().backward()
    print("right")


def check_map_similarity(similarity):
    """similarity(maps): (B, H, N, N) -> a number, the mean cosine similarity of two heads' maps of one picture."""
    for maps in (random(3, 4, 6, 6).softmax(dim=3), random(2, 5, 3, 3, seed=1)):  # the second has negative entries
        batch, heads = maps.shape[:2]
        flat = maps.flatten(2)
        unit = F.normalize(flat, dim=2)  # (B, H, N * N)
        cosines = unit @ unit.transpose(1, 2)  # (B, H, H)
        others = ~torch.eye(heads, dtype=torch.bool)
        across = F.normalize(maps.flatten(1), dim=1)
        rows = F.normalize(maps, dim=3)
        centred = F.normalize(flat - flat.mean(dim=2, keepdim=True), dim=2)
        found = answer_leaving(similarity, maps)
        if isinstance(found, torch.Tensor) and found.shape == (batch,):
            raise WrongAnswer("it returned a number for each picture: take their mean")
        compare_quietly(torch.tensor(number(found)), cosines[:, others].mean(), {
            "each head is compared with itself too, which is always one: leave the diagonal out": cosines.mean(),
            "the pairs of different heads are H (H - 1), not H * H: the sum is divided by too many":
                cosines[:, others].sum() / (batch * heads**2),
            "each pair is counted once, but divided by H (H - 1), which counts it twice":
                cosines[:, others].sum() / (2 * batch * heads * (heads - 1)),
            "it is the sum over the pairs, not their mean": cosines[:, others].sum() / batch,
            "it is the sum over pictures and pairs, not their mean": cosines[:, others].sum(),
            "only the first picture counts": cosines[0, others].mean(),
            "only the first two heads are compared": cosines[:, 0, 1].mean(),
            "only neighbouring heads are compared": cosines.diagonal(1, 1, 2).mean(),
            "whole pictures are compared, not heads": (across @ across.T)[~torch.eye(batch, dtype=torch.bool)].mean(),
            "the maps are not scaled to length one": (flat @ flat.transpose(1, 2))[:, others].mean(),
            "row is compared with row; take each map as one vector of N * N numbers":
                torch.einsum("bhnm,bgnm->bhgn", rows, rows)[:, others].mean(),
            "the mean is taken off the maps first; that is the next step, not this one":
                (centred @ centred.transpose(1, 2))[:, others].mean(),
            "the signs are gone: two maps can be alike by less than zero": cosines[:, others].abs().mean(),
        })
    print("right")
