"""The checks of notebooks/02_expansion.ipynb."""

import copy

import torch
from torch import nn

from refiner_min.exercises import WrongAnswer, answer, answer_leaving, compare, compare_quietly, number, random


def check_expand(expand):
    """expand(maps, weight): (B, H, N, N) and (E, H) -> (B, E, N, N)."""
    for seed, (batch, heads, tokens, expanded) in enumerate([(2, 3, 4, 7), (4, 5, 3, 5)]):
        maps = random(batch, heads, tokens, tokens, seed=seed).softmax(dim=3)
        weight = random(expanded, heads, seed=8 + seed)

        def mixed(weight, maps=maps):
            return torch.einsum("eh,bhij->beij", weight, maps)

        right = mixed(weight)
        compare_quietly(answer_leaving(expand, maps, weight), right, {
            "queries and keys of the maps have changed places": right.transpose(2, 3),
            "the batch and the new maps have changed places: (E, B, N, N), not (B, E, N, N)": right.transpose(0, 1),
            "the weights are turned into shares by a softmax; they are free numbers": mixed(weight.softmax(dim=1)),
            "it is a mean over the heads, not their sum": right / heads,
            "negative entries are set to zero; that comes later, here all is linear": right.relu(),
            "the weights are made positive; they are free numbers": mixed(weight.abs()),
            "every new map is the same: sum over the heads, but keep one row of the weights for each new map":
                mixed(weight.sum(dim=0, keepdim=True)).expand(-1, expanded, -1, -1),
            "every new map is the same, the plain sum of all: each takes each head with a weight of its own":
                maps.sum(dim=1, keepdim=True).expand(-1, expanded, -1, -1),
            "the weights are read the wrong way round: row e holds what new map e takes of each head":
                mixed(weight.reshape(heads, expanded).T),
        })
    print("right")


def check_parameters(parameters):
    """parameters(heads, ratio, kernel): how many a published refinement has."""
    def count(heads, ratio, kernel, expansion=1, reduction=1, depthwise=True, power=2, norms=2, last=1, bias=0):
        expanded = ratio * heads
        kernels = expanded * kernel**power * (1 if depthwise else expanded)
        maps = 2 * expanded + heads + last * heads  # that have a BatchNorm
        return (expansion * heads * expanded + kernels + reduction * expanded * heads + norms * maps
                + bias * (2 * expanded + heads))

    cases = [(12, 3, 3), (4, 5, 3), (16, 2, 5)]
    mistakes = {
        "the BatchNorms are missing: a weight and a bias for each of their maps": lambda *case: count(*case, norms=0),
        "a BatchNorm has two numbers a map, a weight and a bias; here it has one": lambda *case: count(*case, norms=1),
        "a BatchNorm's running mean and variance are not parameters, nothing trains them":
            lambda *case: count(*case, norms=4),
        "a BatchNorm of H maps is missing: there is one after the reduction, and one after the skip":
            lambda *case: count(*case, last=0),
        "a BatchNorm of E maps is missing: there is one after the expansion, and one after the local convolution":
            lambda heads, ratio, kernel: count(heads, ratio, kernel) - 2 * ratio * heads,
        "the local convolution is depth-wise: one k x k kernel a map, which sees no other map":
            lambda *case: count(*case, depthwise=False),
        "a kernel has k * k numbers, not k": lambda *case: count(*case, power=1),
        "a kernel has k * k numbers, not 2 k":
            lambda heads, ratio, kernel: count(heads, ratio, kernel) + ratio * heads * (2 - kernel) * kernel,
        "the local convolution is missing": lambda heads, ratio, kernel: count(heads, ratio, 0),
        "the reduction is missing: it has E H weights, as many as the expansion":
            lambda *case: count(*case, reduction=0),
        "the convolutions have no bias": lambda *case: count(*case, bias=1),
        "the expansion is not counted: there are E = ratio * heads maps after it, not H":
            lambda heads, ratio, kernel: count(heads, 1, kernel),
        "ratio is E / H, so E is ratio * heads; here E is the ratio": lambda heads, ratio, kernel:
            2 * heads * ratio + ratio * kernel**2 + 4 * ratio + 4 * heads,
    }
    found = torch.tensor([number(answer(parameters, *case)) for case in cases], dtype=torch.float64)
    compare(found, torch.tensor([count(*case) for case in cases]).double(), {
        sentence: torch.tensor([wrong(*case) for case in cases]).double() for sentence, wrong in mistakes.items()})


def check_collapse(collapse):
    """collapse(expansion, reduction): (E, H) and (H, E) -> (H, H)."""
    for seed, (expanded, heads) in enumerate([(7, 3), (4, 4)]):  # in the second either order has the right shape
        expansion, reduction = random(expanded, heads, seed=seed), random(heads, expanded, seed=8 + seed)
        compare_quietly(answer_leaving(collapse, expansion, reduction), reduction @ expansion, {
            "that is an expansion after a reduction, (E, E): what is applied first stands on the right":
                expansion @ reduction,
            "it is transposed": (reduction @ expansion).T,
            "both: transposed, and in the wrong order": (expansion @ reduction).T,
            "the two are added, not applied one after the other": reduction + expansion.T,
            "entry is multiplied by entry; one matrix after the other is their matrix product":
                reduction * expansion.T,
            "only the expansion is in it": expansion.T @ expansion,
            "only the reduction is in it": reduction @ reduction.T,
        })
    print("right")


def explained(output, maps, constant=True, mixing=True):
    """The squares of output (B, H, N, N), and those that the closest mixing of maps and a constant leaves."""
    x, y = (stack.double().transpose(0, 1).flatten(1).T for stack in (maps, output))  # (B * N * N, H)
    if constant:
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    if not mixing:
        return y.square().sum(), (y - x * (x * y).sum(dim=0) / x.square().sum(dim=0)).square().sum()
    return y.square().sum(), (y - x @ torch.linalg.lstsq(x, y).solution).square().sum()


def check_unexplained(unexplained):
    """unexplained(output, maps): (B, H, N, N) each -> the share of the variance that no mixing explains, a number."""
    for seed, shape in enumerate([(3, 2, 5, 5), (2, 4, 6, 6)]):
        maps = random(*shape, seed=seed).softmax(dim=3)
        mixed = torch.einsum("gh,bhij->bgij", random(shape[1], shape[1], seed=8 + seed), maps)
        output = mixed * (1 + seed) + 0.3 * random(*shape, seed=16 + seed) + random(shape[1], 1, 1, seed=24) + 1
        (every, rest), (raw, without) = explained(output, maps), explained(output, maps, constant=False)
        (turned, turned_rest), alone = explained(maps, output), explained(output, maps, mixing=False)[1]
        by_picture = torch.tensor([explained(*pair) for pair in zip(output.split(1), maps.split(1))])
        each = torch.tensor([rest / every for every, rest in by_picture])
        compare_quietly(torch.tensor(number(answer_leaving(unexplained, output, maps))).double(), rest / every, {
            "that is the share that is explained; what is asked for is the rest": 1 - rest / every,
            "the constant is missing: take the mean of each column off both sides first": without / raw,
            "the means are taken off the output only after the fit: take them off both sides before":
                without / every,
            "the share is of the squares of the output with its mean: take the mean off": rest / raw,
            "it is a root: a share of variance is a share of sums of squares": (rest / every).sqrt(),
            "output and maps have changed places: the maps are to explain the output": turned_rest / turned,
            "each map explains its own head only; a mixing takes all heads": alone / every,
            "each picture has a mixing of its own; it is one for all": by_picture[:, 1].sum() / by_picture[:, 0].sum(),
            "each picture has a mixing of its own; it is to be one for all": each.mean(),
            "the rest is not divided by the variance of the output": rest,
            "the mean of the rest's squares is not divided by the variance of the output": rest / output.numel(),
        })
    print("right")


def batch_norm(width: int, seed: int) -> nn.BatchNorm2d:
    """As after training, in evaluation: with statistics and weights of its own, and an eps that counts."""
    norm = nn.BatchNorm2d(width, eps=0.03).eval().requires_grad_(False)
    norm.running_mean, norm.weight.data, norm.bias.data = (random(width, seed=seed + part) for part in range(3))
    norm.running_var = random(width, seed=seed + 3).square() / 4 + 0.02
    return norm


@torch.no_grad()
def check_fold(fold):
    """fold(weight, norm): (E, H) and a BatchNorm2d of E maps in evaluation -> one weight (E, H) and one bias (E,)."""
    for seed, (expanded, heads) in enumerate([(7, 3), (4, 4)]):
        weight, norm = random(expanded, heads, seed=seed), batch_norm(expanded, seed=8 + seed)
        given, mean, shift = copy.deepcopy(norm), norm.running_mean, norm.bias
        root = (norm.running_var + norm.eps).sqrt()
        found = answer_leaving(lambda kept, given=given: fold(kept, given), weight)
        if any(not torch.equal(value, given.state_dict()[name]) for name, value in norm.state_dict().items()):
            raise WrongAnswer("it changes the BatchNorm in place: compute new tensors")
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise WrongAnswer("it is to return two things: the weight (E, H) and the bias (E,)")
        scale = norm.weight / root  # (E,)
        if all(isinstance(part, torch.Tensor) for part in found) and found[0].ndim < found[1].ndim:
            raise WrongAnswer("weight and bias have changed places: the weight is returned first")
        scales = {
            "the running variance is used without its root": norm.weight / (norm.running_var + norm.eps),
            "eps is missing: it is added to the variance under the root": norm.weight / norm.running_var.sqrt(),
            "eps is added after the root; it stands under it": norm.weight / (norm.running_var.sqrt() + norm.eps),
            "BatchNorm's own weight is missing in the scale": 1 / root,
            "the maps are multiplied by the deviation; BatchNorm divides by it": norm.weight * root,
            "the deviation is missing in the scale": norm.weight.clone(),
        }
        faults = {sentence: wrong[:, None] * weight for sentence, wrong in scales.items()} | {
            "the weight is not scaled: BatchNorm multiplies all that new map e is made of": weight,
            "BatchNorm's bias is added to the weight; it belongs into the bias":
                scale[:, None] * weight + shift[:, None]}
        if expanded == heads:  # else torch refuses
            faults["the scale goes along the heads; it belongs to the new maps, the rows"] = weight * scale
        compare_quietly(found[0], scale[:, None] * weight, faults)
        compare_quietly(found[1], shift - mean * scale, {
            sentence + ", in the bias": shift - mean * wrong for sentence, wrong in scales.items()} | {
            "the running mean is missing in the bias: it is taken off before the scale": shift,
            "BatchNorm's bias is missing in the bias": -mean * scale,
            "the running mean is added; it is taken off": shift + mean * scale,
            "the running mean is taken off after the scale; it comes before, so it is scaled too": shift - mean,
            "BatchNorm's bias is scaled too; it comes after the scale": (shift - mean) * scale,
            "the bias is that of a BatchNorm after a bias; the sign is turned": mean * scale - shift,
            "the bias is (E, 1), it is to be (E,)": (shift - mean * scale)[:, None],
        })
    print("right")
