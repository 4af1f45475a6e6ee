import math

import torch

from refiner_min.relabel import Labels, cutmix
from refiner_min.step import parameter_groups


def schedule(step, warmup, total):
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * step / total)) / 2


def scheduled(climb=lambda s, w: s / w, fall=lambda s, w, n: schedule(s, 0, n)):
    return lambda step, warmup, total: climb(step, warmup) if step < warmup else fall(step, warmup, total)


def average(old, weights, decay):
    return decay * old + (1 - decay) * weights


def rates(depth, last):
    return [last * index / (depth - 1) for index in range(depth)]


def groups(network, keep=lambda name, parameter: parameter.ndim > 1 and name not in ("class_token", "position")):
    decay = [parameter for name, parameter in network.named_parameters() if keep(name, parameter)]
    return decay, [parameter for name, parameter in network.named_parameters() if not keep(name, parameter)]


def groups_of_the_package(network):
    return tuple(group["params"] for group in parameter_groups(network, 0.05))


def cutmix_labels(image, tokens, box, size, mixed=None, patch=None, inside=None, partner=lambda values: values.flip(0)):
    row0, col0, row1, col1 = box
    share = (row1 - row0) * (col1 - col0) / size**2 if mixed is None else mixed(*box, size)
    grid = round(tokens.shape[1] ** 0.5)
    centre = (torch.arange(grid) + 0.5) * size / grid if patch is None else patch(torch.arange(grid), size / grid)
    inside = inside or (lambda values, low, high: (values >= low) & (values < high))
    covered = inside(centre, row0, row1)[:, None] & inside(centre, col0, col1)
    return ((1 - share) * image + share * partner(image),
            torch.where(covered.flatten()[:, None], partner(tokens), tokens))


def cutmix_of_the_package(image, tokens, box, size):
    return cutmix(torch.zeros(len(image), 1, size, size), Labels(image, tokens), box)[1]


def cutmix_by_pixels(image, tokens, box, size):
    """Whose pixel is at each centre?"""
    row0, col0, row1, col1 = box
    pasted = torch.zeros(size, size)
    pasted[row0:row1, col0:col1] = 1
    grid = math.isqrt(tokens.shape[1])
    for token in range(grid * grid):
        row, col = divmod(token, grid)
        if pasted[int((row + 0.5) * size / grid), int((col + 0.5) * size / grid)]:
            tokens[:, token] = tokens[:, token].flip(0)
    share = pasted.mean().item()
    return [image * (1 - share) + image.flip(0) * share, tokens]


def cut(**how):
    return lambda *case: cutmix_labels(*case, **how)


def cut_tokens(tokens):
    return lambda image, old, box, size: (cutmix_labels(image, old, box, size)[0], tokens(old, box, size))


def cut_patches(inside):
    """Going by where patches begin and end, in place of their centres."""
    def tokens(old, box, size):
        grid = math.isqrt(old.shape[1])
        begin, end = (torch.arange(grid) * size / grid, torch.arange(1, grid + 1) * size / grid)
        rows, cols = inside(begin, end, box[0], box[2]), inside(begin, end, box[1], box[3])
        return torch.where((rows[:, None] & cols).flatten()[:, None], old.flip(0), old)
    return cut_tokens(tokens)


RIGHT = {
    "schedule": [schedule, lambda *case: torch.tensor(schedule(*case)), lambda *case: torch.tensor([schedule(*case)])],
    "average": [average, lambda old, weights, decay: old + (1 - decay) * (weights - old),
                lambda old, weights, decay: torch.lerp(old, weights, 1 - decay),
                lambda old, weights, decay: old.clone().mul_(decay).add_(weights, alpha=1 - decay)],
    "drop_rates": [rates, lambda *case: tuple(rates(*case)), lambda *case: torch.tensor(rates(*case)),
                   lambda depth, last: torch.linspace(0, last, depth), lambda *case: iter(rates(*case))],
    "groups": [groups, groups_of_the_package, lambda network: [list(reversed(group)) for group in groups(network)],
               lambda network: tuple(map(set, groups(network)))],
    "cutmix_labels": [cutmix_labels, cutmix_of_the_package, cutmix_by_pixels],
}
WRONG = [
    ("schedule", scheduled(lambda s, w: (s + 1) / (w + 1)), r"not 1 / \(warmup \+ 1\)"),
    ("schedule", scheduled(lambda s, w: (s + 1) / w), r"not \(step \+ 1\) / warmup"),
    ("schedule", scheduled(lambda s, w: (s + 1) / (w + 1), lambda s, w, n: schedule(s - w, 0, n - w)),
     "and the cosine where the warm-up ends"),
    ("schedule", scheduled(fall=lambda s, w, n: schedule(s - w, 0, n - w)), "not from the end of the warm-up"),
    ("schedule", scheduled(fall=lambda s, w, n: schedule(s - w, 0, n)), r"not \(step - warmup\) / total"),
    ("schedule", scheduled(fall=lambda s, w, n: schedule(s, 0, n - w)), "not by total - warmup"),
    ("schedule", scheduled(fall=lambda s, w, n: schedule(s, 0, n - 1)), "not by total - 1"),
    ("schedule", scheduled(fall=lambda s, w, n: schedule(2 * s, 0, n)), "a whole turn"),
    ("schedule", scheduled(fall=lambda s, w, n: math.cos(math.pi / 2 * s / n)), "a quarter of a turn"),
    ("schedule", scheduled(fall=lambda s, w, n: (1 + math.cos(s / n)) / 2), "pi is missing"),
    ("schedule", scheduled(fall=lambda s, w, n: 1 + math.cos(math.pi * s / n)), "the half is missing"),
    ("schedule", scheduled(fall=lambda s, w, n: math.cos(math.pi * s / n) / 2), "the 1 is missing"),
    ("schedule", scheduled(fall=lambda s, w, n: (1 - math.cos(math.pi * s / n)) / 2), "the cosine climbs"),
    ("schedule", lambda s, w, n: s / w if s <= w else schedule(s, 0, n), "goes on too long"),
    ("schedule", lambda s, w, n: min(s / w, 1) * schedule(s, 0, n), "climbs along the cosine"),
    ("schedule", scheduled(fall=lambda s, w, n: 1 - s / n), "along a straight line"),
    ("schedule", lambda s, w, n: schedule(s, 0, n), "there is no warm-up"),
    ("schedule", lambda s, w, n: min(s / w, 1), "there is no cosine"),
    ("schedule", scheduled(lambda s, w: s // w), "rounds down"),
    ("schedule", lambda s, w, n: 0.5, "differ"),
    ("schedule", lambda s, w, n: schedule(s, 10, 100), "differ"),
    ("schedule", lambda s, w, n: (s, schedule(s, w, n)), "a tuple of 2, not a number"),
    ("schedule", lambda s, w, n: None, "returned nothing"),
    ("average", lambda old, weights, decay: (1 - decay) * old + decay * weights, "changed places"),
    ("average", lambda old, weights, decay: decay * old + weights, "without their share"),
    ("average", lambda old, weights, decay: old + (1 - decay) * weights, "keeps its whole weight"),
    ("average", lambda old, weights, decay: (old + weights) / 2, "a plain mean"),
    ("average", lambda old, weights, decay: old, "as it was"),
    ("average", lambda old, weights, decay: weights, "the new weights; the average"),
    ("average", lambda old, weights, decay: decay * old - (1 - decay) * weights, "taken away"),
    ("average", lambda old, weights, decay: old - (1 - decay) * (weights - old), "moves away"),
    ("average", lambda old, weights, decay: old.mul_(decay).add_(weights, alpha=1 - decay), "old has changed"),
    ("average", lambda old, weights, decay: old.copy_(average(old, weights, decay)), "old has changed"),
    ("average", lambda old, weights, decay: weights.mul_(1 - decay).add_(old, alpha=decay), "weights have changed"),
    ("average", lambda old, weights, decay: (average(old, weights, decay), decay), "a tuple of 2, not one tensor"),
    ("average", lambda old, weights, decay: average(old, weights, 0.9), "differ"),
    ("average", lambda old, weights, decay: None, "returned nothing"),
    ("drop_rates", lambda depth, last: last, "not a list of rates"),
    ("drop_rates", lambda depth, last: [last] * depth, "every block has the same rate"),
    ("drop_rates", lambda depth, last: [last * index / depth for index in range(depth)], "does not reach the rate"),
    ("drop_rates", lambda depth, last: [last * index / depth for index in range(1, depth + 1)], "a rate above zero"),
    ("drop_rates", lambda depth, last: rates(depth, last)[::-1], "they must rise"),
    ("drop_rates", lambda depth, last: rates(depth, 1), "multiply by last"),
    ("drop_rates", lambda depth, last: [last * index for index in range(depth)], "the last one alone"),
    ("drop_rates", lambda depth, last: [last * (index / (depth - 1)) ** 2 for index in range(depth)], "along a square"),
    ("drop_rates", lambda depth, last: [1 - rate for rate in rates(depth, last)], "the shares that stay"),
    ("drop_rates", lambda depth, last: rates(depth + 1, last), "7 rates for 6 blocks"),
    ("drop_rates", lambda depth, last: rates(6, 0.25), "6 rates for 4 blocks"),
    ("drop_rates", lambda depth, last: rates(depth, 0.25), "differ"),
    ("groups", lambda network: groups(network)[::-1], "the two lists have changed places"),
    ("groups", lambda network: groups(network, lambda name, parameter: True), "a bias decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: "bias" not in name), "norm's weight decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: "weight" in name), "norm's weight decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: name.endswith("weight") and "norm" not in name),
     "BatchNorm's weight decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: "bias" not in name and "norm" not in name
                                      and "stem.1" not in name), "a scale decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: parameter.ndim > 1), "the class token decays"),
    ("groups", lambda network: groups(network, lambda name, parameter: parameter.ndim > 1 and name != "class_token"),
     "the positions decay"),
    ("groups", lambda network: groups(network, lambda name, parameter: parameter.ndim == 2), "stem.0.weight does not"),
    ("groups", lambda network: groups(network)[0], "two lists"),
    ("groups", lambda network: ([name for name, _ in network.named_parameters()], []), "two lists"),
    ("groups", lambda network: (groups(network)[0], list(network.parameters())), "is in it twice"),
    ("groups", lambda network: (groups(network)[0], []), "is in no list"),
    ("cutmix_labels", cut(mixed=lambda r0, c0, r1, c1, size: 1 - (r1 - r0) * (c1 - c0) / size**2),
     "of the images, own and partner"),
    ("cutmix_labels", cut(partner=lambda values: values.roll(1, 0)), "of the images, the partner is"),
    ("cutmix_labels", cut(partner=lambda values: values.flip(1)), r"of the images, flip\(1\)"),
    ("cutmix_labels", cut(mixed=lambda r0, c0, r1, c1, size: (r1 - r0 + 1) * (c1 - c0 + 1) / size**2),
     "of the images, the box is half open"),
    ("cutmix_labels", cut(mixed=lambda r0, c0, r1, c1, size: (r1 - r0 + c1 - c0) / (2 * size)), "not of its area"),
    ("cutmix_labels", cut(mixed=lambda r0, c0, r1, c1, size: (r1 - r0) * (c1 - c0) / size), "size . size pixels"),
    ("cutmix_labels", cut(mixed=lambda *box: 0), "the image's labels are not mixed"),
    ("cutmix_labels", cut(mixed=lambda *box: 1), "the whole label is the partner's"),
    ("cutmix_labels", cut(mixed=lambda *box: 0.5), "of the images, its numbers differ"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: cutmix_labels(old[:, 0], old.flip(0), box, size)[1]),
     "of the tokens, own and partner"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: cutmix_labels(
        old[:, 0], old, (box[1], box[0], box[3], box[2]), size)[1]), "rows and columns"),
    ("cutmix_labels", cut(patch=lambda place, side: place * side), "half a patch further"),
    ("cutmix_labels", cut(inside=lambda place, low, high: (place >= low) & (place <= high)), "row1 or col1 is outside"),
    ("cutmix_labels", cut(inside=lambda values, low, high: (values > low) & (values < high)), "row0 or col0 is inside"),
    ("cutmix_labels", cut_patches(lambda begin, end, low, high: (begin < high) & (end > low)), "that the box touches"),
    ("cutmix_labels", cut_patches(lambda begin, end, low, high: (begin >= low) & (end <= high)), "in the box whole"),
    ("cutmix_labels", cut(patch=lambda place, side: place), "taken for tokens"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: torch.lerp(
        old, old.flip(0), (box[2] - box[0]) * (box[3] - box[1]) / size**2)), "by area, as in the published code"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: cutmix_labels(
        old[:, 0], old, box, size, partner=lambda values: values.roll(1, 0))[1]), "of the tokens, the partner"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: cutmix_labels(
        old[:, 0], old, box, size, partner=lambda values: values.flip(1))[1]), r"of the tokens, flip\(1\)"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: old), "those before"),
    ("cutmix_labels", cut_tokens(lambda old, box, size: old.flip(0)), "in the box or not"),
    ("cutmix_labels", lambda image, tokens, box, size: cutmix_labels(image, tokens, box, size)[1], "two tensors"),
    ("cutmix_labels", lambda image, tokens, box, size: (image, None), "of the images, the image's labels"),
    ("cutmix_labels", lambda image, tokens, box, size: (cutmix_labels(image, tokens, box, size)[0], None),
     "of the tokens, it returned None, not one tensor"),
]
