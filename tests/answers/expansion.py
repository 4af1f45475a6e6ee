import torch
import torch.nn.functional as F
from torch import nn


def expand(maps, weight):
    return torch.einsum("eh,bhij->beij", weight, maps)


def expand_by_loops(maps, weight):
    out = torch.zeros(maps.shape[0], weight.shape[0], *maps.shape[2:])
    for e in range(weight.shape[0]):
        for h in range(weight.shape[1]):
            out[:, e] += weight[e, h] * maps[:, h]
    return out


def expand_changing_maps(maps, weight):
    maps *= 2
    return expand(maps, weight) / 2


def parameters(heads, ratio, kernel):
    expanded = ratio * heads
    return 2 * heads * expanded + expanded * kernel**2 + 4 * expanded + 4 * heads


def parameters_counted(heads, ratio, kernel):
    expanded = ratio * heads
    parts = [nn.Conv2d(heads, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.BatchNorm2d(expanded),
             nn.Conv2d(expanded, expanded, kernel, groups=expanded, bias=False), nn.BatchNorm2d(heads),
             nn.Conv2d(expanded, heads, 1, bias=False), nn.BatchNorm2d(heads)]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def columns(stack, centred=True):
    flat = stack.transpose(0, 1).flatten(1).T
    return flat - flat.mean(dim=0) if centred else flat


def unexplained(output, maps, centred=True):
    x, y = columns(maps, centred), columns(output, centred)
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    return (rest.square().sum() / y.square().sum()).item()


def unexplained_with_ones(output, maps):
    """The constant as one more column."""
    x, y = maps.movedim(1, 3).reshape(-1, maps.shape[1]).double(), output.movedim(1, 3).reshape(-1, maps.shape[1])
    x, y = torch.cat([x, torch.ones(len(x), 1)], dim=1), y.double()
    rest = y - x @ (torch.linalg.pinv(x) @ y)
    return rest.var(dim=0).sum() / y.var(dim=0).sum()


def unexplained_by_projection(output, maps):
    x, y = columns(maps), columns(output)
    basis = torch.linalg.qr(x).Q
    return 1 - (basis.T @ y).square().sum().reshape(1) / y.square().sum()


def unexplained_of_raw_squares(output, maps):
    return unexplained(output, maps) * columns(output).square().sum() / output.square().sum()


def unexplained_centred_late(output, maps):
    x, y = columns(maps, centred=False), columns(output, centred=False)
    return (y - x @ torch.linalg.lstsq(x, y).solution).square().sum() / columns(output).square().sum()


def unexplained_by_head(output, maps):
    heads = range(maps.shape[1])
    rests = [unexplained(output[:, [h]], maps[:, [h]]) * columns(output)[:, h].square().sum() for h in heads]
    return sum(rests) / columns(output).square().sum()


def unexplained_by_picture(output, maps):
    return sum(unexplained(*pair) for pair in zip(output.split(1), maps.split(1))) / len(maps)


def unexplained_by_picture_pooled(output, maps):
    squares = [columns(picture).square().sum() for picture in output.split(1)]
    shares = [unexplained(*pair) for pair in zip(output.split(1), maps.split(1))]
    return sum(share * square for share, square in zip(shares, squares)) / sum(squares)


def unexplained_changing_maps(output, maps):
    maps -= maps.mean(dim=(0, 2, 3), keepdim=True)
    return unexplained(output, maps)


def fold(weight, norm, scale=None):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt() if scale is None else scale
    return scale[:, None] * weight, norm.bias - norm.running_mean * scale


def root(norm):
    return (norm.running_var + norm.eps).sqrt()


def fold_by_trying(weight, norm):
    """What the BatchNorm makes of nothing, and of each column."""
    def run(columns):
        return norm(columns[None, :, :, None])[0, :, :, 0]

    bias = run(torch.zeros(len(weight), 1))
    return run(weight) - bias, bias[:, 0]


def fold_by_loops(weight, norm):
    folded, bias = torch.zeros_like(weight), torch.zeros(len(weight))
    for e in range(len(weight)):
        scale = float(norm.weight[e]) / (float(norm.running_var[e]) + norm.eps) ** 0.5
        folded[e] = weight[e] * scale
        bias[e] = norm.bias[e] - norm.running_mean[e] * scale
    return [folded, bias]


def fold_changing_norm(weight, norm):
    found = fold(weight, norm)
    norm.running_var += norm.eps
    return found


def fold_changing_weight(weight, norm):
    found = fold(weight, norm)
    weight *= 0
    return found


RIGHT = {
    "expand": [
        expand, expand_by_loops,
        lambda maps, weight: (weight @ maps.flatten(2)).unflatten(2, maps.shape[2:]),
        lambda maps, weight: F.conv2d(maps, weight[:, :, None, None]),
        lambda maps, weight: torch.tensordot(weight, maps, dims=([1], [1])).transpose(0, 1),
        lambda maps, weight: (weight[None, :, :, None, None] * maps[:, None]).sum(dim=2),
        lambda maps, weight: expand(maps.double(), weight.double()),
    ],
    "parameters": [parameters, parameters_counted, lambda *case: float(parameters(*case)),
                   lambda *case: torch.tensor([parameters(*case)])],
    "collapse": [
        lambda expansion, reduction: reduction @ expansion,
        lambda expansion, reduction: (expansion.T @ reduction.T).T,
        lambda expansion, reduction: torch.einsum("he,eg->hg", reduction, expansion),
        lambda expansion, reduction: reduction.double().mm(expansion.double()),
    ],
    "unexplained": [unexplained, unexplained_with_ones, unexplained_by_projection],
    "fold": [fold, fold_by_trying, fold_by_loops],
}
WRONG = [
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->beji", weight, maps), "queries and keys"),
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->ebij", weight, maps), "the batch and the new maps"),
    ("expand", lambda maps, weight: expand(maps, weight.softmax(1)), "by a softmax"),
    ("expand", lambda maps, weight: torch.stack([(row[:, None, None] * maps).mean(1) for row in weight], 1), "a mean"),
    ("expand", lambda maps, weight: expand(maps, weight).clamp(min=0), "negative entries"),
    ("expand", lambda maps, weight: expand(maps, weight.abs()), "made positive"),
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->bij", weight, maps)[:, None].expand(
        -1, len(weight), -1, -1), "keep one row of the weights"),
    ("expand", lambda maps, weight: maps.sum(1, keepdim=True).expand(-1, len(weight), -1, -1), "the plain sum"),
    ("expand", lambda maps, weight: expand(maps, weight.reshape(weight.shape[::-1]).T), "the wrong way round"),
    ("expand", expand_changing_maps, "in place"),
    ("expand", lambda maps, weight: maps, "the shape .2, 3, 4, 4., not .2, 7, 4, 4."),
    ("expand", lambda maps, weight: torch.ones(2, 7, 4, 4), "its numbers differ"),
    ("expand", lambda maps, weight: None, "does it end with a return"),
    ("parameters", lambda h, r, k: 2 * r * h * h + r * h * k**2, "the BatchNorms are missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - 2 * r * h - 2 * h, "here it has one"),
    ("parameters", lambda h, r, k: parameters(h, r, k) + 4 * r * h + 4 * h, "running mean and variance"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - 2 * h, "a BatchNorm of H maps is missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - 2 * r * h, "a BatchNorm of E maps is missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) + (r * h - 1) * r * h * k**2, "depth-wise"),
    ("parameters", lambda h, r, k: parameters(h, r, k) + r * h * (k - k**2), "k . k numbers, not k"),
    ("parameters", lambda h, r, k: parameters(h, r, k) + r * h * (2 * k - k**2), "k . k numbers, not 2 k"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - r * h * k**2, "local convolution is missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - r * h * h, "the reduction is missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) + 2 * r * h + h, "have no bias"),
    ("parameters", lambda h, r, k: parameters(h, 1, k), "the expansion is not counted"),
    ("parameters", lambda h, r, k: 2 * h * r + r * k**2 + 4 * r + 4 * h, "here E is the ratio"),
    ("parameters", lambda h, r, k: 1380, "its numbers differ"),
    ("parameters", lambda h, r, k: (1380, 1380), "a tuple of 2, not a number"),
    ("parameters", lambda h, r, k: torch.ones(3), "the shape .3,., not a number"),
    ("parameters", lambda h, r, k: None, "does it end with a return"),
    ("collapse", lambda expansion, reduction: (reduction @ expansion).T, "^it is transposed"),
    ("collapse", lambda expansion, reduction: expansion @ reduction, "what is applied first stands on the right"),
    ("collapse", lambda expansion, reduction: reduction.T @ expansion.T, "in the wrong order"),
    ("collapse", lambda expansion, reduction: expansion.T + reduction, "the two are added"),
    ("collapse", lambda expansion, reduction: expansion.T * reduction, "their matrix product"),
    ("collapse", lambda expansion, reduction: expansion.T @ expansion, "only the expansion"),
    ("collapse", lambda expansion, reduction: reduction @ reduction.T, "only the reduction"),
    ("collapse", lambda expansion, reduction: expansion, "the shape .7, 3., not .3, 3."),
    ("collapse", lambda expansion, reduction: torch.eye(expansion.shape[1]), "its numbers differ"),
    ("collapse", lambda expansion, reduction: reduction @ expansion.add_(1), "in place"),
    ("collapse", lambda expansion, reduction: (reduction, expansion), "a tuple of 2, not one tensor"),
    ("unexplained", lambda output, maps: 1 - unexplained(output, maps), "the share that is explained"),
    ("unexplained", lambda output, maps: unexplained(output, maps, centred=False), "the constant is missing"),
    ("unexplained", unexplained_centred_late, "only after the fit"),
    ("unexplained", unexplained_of_raw_squares, "the output with its mean"),
    ("unexplained", lambda output, maps: unexplained(output, maps) ** 0.5, "it is a root"),
    ("unexplained", lambda output, maps: unexplained(maps, output), "changed places"),
    ("unexplained", unexplained_by_head, "its own head only"),
    ("unexplained", unexplained_by_picture, "a mixing of its own; it is to be one"),
    ("unexplained", unexplained_by_picture_pooled, "a mixing of its own; it is one"),
    ("unexplained", lambda output, maps: unexplained(output, maps) * columns(output).square().sum(),
     "^the rest is not divided"),
    ("unexplained", lambda output, maps: unexplained(output, maps) * columns(output).square().sum() / output.numel(),
     "the mean of the rest's squares"),
    ("unexplained", unexplained_changing_maps, "in place"),
    ("unexplained", lambda output, maps: 0.0, "its numbers differ"),
    ("unexplained", lambda output, maps: 1, "its numbers differ"),
    ("unexplained", lambda output, maps: output - maps, "the shape .3, 2, 5, 5., not a number"),
    ("unexplained", lambda output, maps: None, "does it end with a return"),
    ("fold", lambda weight, norm: fold(weight, norm, norm.weight / (norm.running_var + norm.eps)), "without its root"),
    ("fold", lambda weight, norm: fold(weight, norm, norm.weight / norm.running_var.sqrt()), "eps is missing"),
    ("fold", lambda weight, norm: fold(weight, norm, norm.weight / (norm.running_var.sqrt() + norm.eps)),
     "eps is added after the root"),
    ("fold", lambda weight, norm: fold(weight, norm, 1 / root(norm)), "own weight is missing"),
    ("fold", lambda weight, norm: fold(weight, norm, norm.weight * root(norm)), "BatchNorm divides by it"),
    ("fold", lambda weight, norm: fold(weight, norm, norm.weight), "the deviation is missing"),
    ("fold", lambda weight, norm: (weight, fold(weight, norm)[1]), "the weight is not scaled"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0] + norm.bias[:, None], fold(weight, norm)[1]),
     "it belongs into the bias"),
    ("fold", lambda weight, norm: (weight * norm.weight / root(norm) if weight.shape[0] == weight.shape[1]
                                   else fold(weight, norm)[0], fold(weight, norm)[1]), "goes along the heads"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], norm.bias - norm.running_mean / root(norm)),
     "own weight is missing in the scale, in the bias"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], norm.bias), "the running mean is missing"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], fold(weight, norm)[1] - norm.bias), "bias is missing in the"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], 2 * norm.bias - fold(weight, norm)[1]), "mean is added"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], norm.bias - norm.running_mean), "taken off after the scale"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], (norm.bias - norm.running_mean) * norm.weight / root(norm)),
     "scaled too; it comes after"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], -fold(weight, norm)[1]), "the sign is turned"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], fold(weight, norm)[1][:, None]), "it is to be .E,."),
    ("fold", lambda weight, norm: fold(weight, norm)[0], "return two things"),
    ("fold", lambda weight, norm: fold(weight, norm)[::-1], "the weight is returned first"),
    ("fold", lambda weight, norm: (fold(weight, norm)[0], 0), "returned 0, not one tensor"),
    ("fold", lambda weight, norm: None, "does it end with a return"),
    ("fold", fold_changing_norm, "changes the BatchNorm"),
    ("fold", fold_changing_weight, "in place"),
]
