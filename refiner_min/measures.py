"""What a trained model's maps and tokens are like, in numbers: how alike heads, tokens and layers are, where attention
looks, and how much of the refinement is used.

    measure(model, split, device, batch_size) -> dict of lists, an entry a block
    measure_run(folder, device)                  of the model of a run

The questions are the paper's (its figures 1 to 4) and those of arXiv:2103.11886 (DeepViT); the definitions are below.
It imports model, augment and evaluation; and data, recipes and checkpoint, to open a run.
"""

import math
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from refiner_min.augment import normalise
from refiner_min.checkpoint import config_of, load, load_weights, weights_of
from refiner_min.data import load_subset
from refiner_min.evaluation import evaluate
from refiner_min.model import RefinerViT
from refiner_min.recipes import build_model, saved_recipe

PICTURES = 512  # of the split, evenly spread, over which maps and tokens are measured
KEPT = {  # measure: the weight of a block's attention
    "kept_expand": "refinement.expand.0.weight",
    "kept_convolve": "refinement.convolve.0.weight",
    "kept_reduce": "refinement.reduce.0.weight",
    "kept_projection": "proj.weight",
}


def measure(model: RefinerViT, split, device: torch.device, batch_size: int = 64) -> dict:
    """Measures of the model in evaluation mode over the split's pictures, as evaluation sees them, rounded.

    By block: head_similarity, head_similarity_centred, entropy, distance of the maps that gather the values; of the
    blocks that refine, those of use_of_refinement, None for the others. After the embedding and after each block:
    token_similarity, and cka, a matrix. Of the whole split: the accuracies of ablations.
    """
    model, split = model.to(device).eval(), split.to(device)
    chosen = torch.linspace(0, len(split) - 1, min(PICTURES, len(split))).round().long()
    batches = [normalise(batch.pictures) for batch in split.epoch(chosen, batch_size)]
    of_blocks, tokens, moments, count = [], 0, Moments(), 0
    for images in batches:
        layers = layers_of(model, images)  # depth + 1 times (B, N-1, C)
        measured = [measure_block(block, maps) for block, maps in zip(model.blocks, model.attention_maps(images))]
        of_blocks.append([{name: value * len(images) for name, value in block.items()} for block in measured])
        tokens = tokens + torch.stack([token_similarity(layer) for layer in layers]) * len(images)
        moments.add(layers)
        count += len(images)
    blocks = [{name: sum(float(block[name]) for block in same) / count for name in same[0]} for same in zip(*of_blocks)]
    found = {"pictures": count, "token_similarity": (tokens / count).tolist(), "cka": moments.cka().tolist(),
             **{name: [block.get(name) for block in blocks] for name in blocks[-1] | blocks[0]}}
    return rounded(found | ablations(model, batches, lambda network: evaluate(network, split, device, batch_size,
                                                                              folded=False).accuracy))


def measure_run(folder: Path, device: torch.device) -> dict:
    """measure and kept of the model that the run in a folder, begun from scratch, evaluated last, over its validation
    pictures."""
    path = folder / "last.pt"
    state = load(path)
    config_of(state, path, needed=["subset", "data", "recipe"])
    recipe = saved_recipe(state, path)
    subset = load_subset(state["subset"], state["data"], recipe.img_size, only_val=True, hold_out=recipe.hold_out,
                         grid=recipe.img_size // recipe.patch_size, eval_crop=recipe.eval_crop)
    model = build_model(recipe, len(subset.classes), subset.channels)
    began = deepcopy(model)  # as the run did, which built it with the same seed
    load_weights(model, weights_of(state)[0])
    return measure(model, subset.val, device) | rounded(kept(model, began))


def rounded(value):
    """Every float in it to four decimals."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


@torch.no_grad()
def layers_of(model: RefinerViT, images) -> list[torch.Tensor]:
    """The patch tokens after the embedding and after each block: depth + 1 times (B, N-1, C)."""
    x, handed = model.embed(images), None
    layers = [x[:, 1:]]
    for block in model.blocks:
        x, handed = block(x, handed)
        layers.append(x[:, 1:])
    return layers


# ----------------------------------------------------------------------------------------------------------------------
# Maps


def measure_block(block, maps) -> dict[str, torch.Tensor]:
    """The measures of one block's maps, means over the batch."""
    gathering = maps.raw if maps.refined is None else maps.refined
    found = {"head_similarity": head_similarity(gathering), "entropy": entropy(gathering),
             "head_similarity_centred": head_similarity(beyond_even(gathering)),
             "distance": mean_distance(gathering)}
    return found | (use_of_refinement(block.attention.refinement, maps) if maps.refined is not None else {})


def mean_cosine(vectors) -> torch.Tensor:
    """The mean cosine between two of n vectors: (B, n, length) -> scalar."""
    n = vectors.shape[1]
    unit = F.normalize(vectors, dim=2)
    return ((unit.sum(dim=1).square().sum(dim=1) - n) / (n * (n - 1))).mean() if n > 1 else unit.new_tensor(1.0)


def head_similarity(maps) -> torch.Tensor:
    """How alike the heads' maps (B, H, N, N) are: the mean cosine between two of a picture."""
    return mean_cosine(maps.flatten(2))


def beyond_even(maps):
    """Maps (B, H, N, N) without their mean: what they say beyond looking everywhere alike. Without it, maps that have
    nothing but evenness in common have a cosine of 0."""
    return maps - maps.mean(dim=(2, 3), keepdim=True)


def token_similarity(tokens) -> torch.Tensor:
    """How alike the tokens (B, T, C) are: the mean cosine between two of a picture."""
    return mean_cosine(tokens)


def weights(maps) -> torch.Tensor:
    """Rows as distributions: absolute entries over their sum, since a refined map may have negative ones."""
    return F.normalize(maps, p=1, dim=3).abs()


def entropy(maps) -> torch.Tensor:
    """Of a row over that of an even one: 0 where it looks at one token, 1 where it looks at all of them alike."""
    return torch.special.entr(weights(maps)).sum(dim=3).mean() / math.log(maps.shape[3])


def mean_distance(maps) -> torch.Tensor:
    """How far a patch looks, in patches: the mean over rows of the distance to the patches, weighted by the row."""
    rows = weights(maps[:, :, 1:, 1:])  # (B, H, N-1, N-1)
    side = round(rows.shape[3] ** 0.5)
    index = torch.arange(side * side, device=maps.device)
    places = torch.stack([index // side, index % side], dim=1).float()  # (N-1, 2)
    return (rows * torch.cdist(places, places)).sum(dim=3).mean()


# ----------------------------------------------------------------------------------------------------------------------
# The refinement


def use_of_refinement(refinement, maps) -> dict[str, torch.Tensor]:
    """same: the correlation of a refined map with the map that came in, mean over heads, signs and all: 1 where the
    refinement only scales it by something positive and shifts it. gain: how many times the incoming map is in it, the
    mean over heads of the absolute slopes of closest_copy. With BatchNorm: branch_scale, the mean of the absolute
    scales of the one after the reduction, which is the branch's deviation in training; map_deviation, that of the map
    it is added to; and branch_share, the branch's part of the variance of the two."""
    found = {"same": correlation(maps.raw, maps.refined), "gain": slopes(maps.raw, maps.refined).abs().mean()}
    if refinement.norm is None:
        return found
    scale = refinement.reduce[1].weight.detach()  # (H,)
    variance = maps.raw.var(dim=(0, 2, 3))  # (H,)
    return found | {"branch_scale": scale.abs().mean(), "map_deviation": variance.sqrt().mean(),
                    "branch_share": (scale.square() / (scale.square() + variance)).mean()}


def kept(model: RefinerViT, began: RefinerViT) -> dict[str, list]:
    """Of the refinement's weights, and of the attention's projection to compare with, the cosine with what they began
    as: 1 where training has left their direction as it was. By block, None where there is no such weight."""
    def cosine(one, other) -> float | None:
        return None if one is None else F.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()

    blocks = [[block.attention.state_dict() for block in pair] for pair in zip(model.blocks, began.blocks)]
    return {measure: [cosine(one.get(name), other.get(name)) for one, other in blocks]
            for measure, name in KEPT.items()}


def correlation(one, other) -> torch.Tensor:
    """Of two stacks of maps (B, H, N, N), entry by entry, mean over pictures and heads."""
    one, other = (maps.flatten(2) - maps.flatten(2).mean(dim=2, keepdim=True) for maps in (one, other))
    return F.cosine_similarity(one, other, dim=2).mean()


def slopes(incoming, refined) -> torch.Tensor:
    """Of the least squares lines through the entries of maps before and after, (B, H, N, N) both, head by head over the
    batch: (H, 1, 1)."""
    dims = dict(dim=(0, 2, 3))
    x, y = (maps - maps.mean(**dims, keepdim=True) for maps in (incoming, refined))
    return ((x * y).mean(**dims) / x.square().mean(**dims))[:, None, None]


def mean_of_branch(reduce, args, output):
    """Hook on the reduction and its BatchNorm: what they give on average, and nothing else. The BatchNorm after the
    skip sees the mean that it is used to, but where the branch was most of the deviation, a map that is far smaller."""
    return torch.zeros_like(output) + reduce[1].bias[:, None, None]


def closest_copy(refinement, args, output):
    """Hook on the refinement: the map that came in, scaled and shifted, one scale and shift a head, to be as close to
    the refined one as it can be over the batch (least squares). Its deviation is that of the refined one times their
    correlation: where these have little in common, little is left."""
    dims = dict(dim=(0, 2, 3), keepdim=True)
    return output.mean(**dims) + slopes(args[0], output) * (args[0] - args[0].mean(**dims))


@contextmanager
def changed(modules, hook):
    """The modules give what the hook makes of their output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablations(model: RefinerViT, batches: list[torch.Tensor], accuracy) -> dict[str, float | None]:
    """accuracy(model), and with the refinement switched off in every block: without_branch, nothing but the skip is
    left, and without_branch_anew, the same with all BatchNorms' statistics taken anew over batches of images, so that
    the skip alone is as large as the two were (None of the linear form, which has no skip); with_copies, refined maps
    are but scaled copies of those that come in. None where nothing is refined."""
    refinements = [block.attention.refinement for block in model.blocks if block.attention.refinement is not None]
    found = {"accuracy": accuracy(model), "accuracy_without_branch": None, "accuracy_without_branch_anew": None,
             "accuracy_with_copies": None}
    if refinements and not model.config.linear:
        with changed([refinement.reduce for refinement in refinements], mean_of_branch):
            found["accuracy_without_branch"] = accuracy(model)
            anew = deepcopy(model)  # with its hooks
            for block in anew.blocks:
                block.drop_path.p = 0.0  # update_bn puts all of it into training mode
            update_bn(batches, anew)
            found["accuracy_without_branch_anew"] = accuracy(anew)
    if refinements:
        with changed(refinements, closest_copy):
            found["accuracy_with_copies"] = accuracy(model)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class Moments:
    """Sums over tokens from which linear CKA between all layers comes, batch by batch (Kornblith et al. 2019,
    arXiv:1905.00414): of centred X and Y, |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms."""

    def __init__(self):
        self.count, self.total, self.products = 0, 0, 0

    def add(self, layers: list[torch.Tensor]):
        """layers: L times (B, T, C)."""
        x = torch.stack(layers).flatten(1, 2).transpose(0, 1).flatten(1)  # (B * T, L * C)
        self.layers, self.count = len(layers), self.count + len(x)
        self.total, self.products = self.total + x.double().sum(dim=0), self.products + (x.T @ x).double()

    def cka(self) -> torch.Tensor:
        """(L, L)"""
        centred = self.products - torch.outer(self.total, self.total) / self.count
        squares = centred.unflatten(1, (self.layers, -1)).unflatten(0, (self.layers, -1)).square().sum(dim=(1, 3))
        norms = squares.diagonal().sqrt()  # of X^T X, layer by layer
        return squares / torch.outer(norms, norms)
