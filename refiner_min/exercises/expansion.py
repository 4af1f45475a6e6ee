"""The checks of notebooks/02_expansion.ipynb."""

import torch

from refiner_min.exercises import answer, compare, random


def check_expand(expand):
    """expand(maps, weight): (B, H, N, N) and (E, H) -> (B, E, N, N)."""
    maps, weight = random(2, 3, 4, 4).softmax(dim=3), random(6, 3, seed=1)
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
    expansion, reduction = random(8, 4), random(4, 8, seed=1)
    compare(answer(collapse, expansion, reduction), reduction @ expansion, {
        "that is an expansion after a reduction, (E, E): what is applied first stands on the right":
            expansion @ reduction,
        "it is transposed": (reduction @ expansion).T,
        "the two are added, not applied one after the other": reduction + expansion.T,
    })
