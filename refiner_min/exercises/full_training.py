"""The checks of notebooks/05_full_training.ipynb."""

import math

import torch
from torch import nn

from refiner_min.exercises import WrongAnswer, answer, compare, compare_quietly, number, random, said_with


def check_schedule(rate):
    """rate(step, warmup, total): the share of the peak learning rate; linear warm-up, then half a cosine to zero that
    counts from step 0."""
    cases = [(step, warmup, total) for warmup, total in ((10, 100), (7, 60))
             for step in (0, 3, warmup - 1, warmup, warmup + 1, 35, 50, total - 1)]

    def curve(climb=lambda s, w, n: s / w, fall=lambda s, w, n: math.cos(math.pi * s / n) / 2 + 0.5, last=0):
        return torch.tensor([climb(s, w, n) if s < w + last else fall(s, w, n) for s, w, n in cases])

    def fall(of):
        return curve(fall=lambda s, w, n: (1 + math.cos(math.pi * of(s, w, n))) / 2)

    def product(s, w, n):
        return s / w * (1 + math.cos(math.pi * s / n)) / 2

    faults = {
        "the warm-up begins at 0, and the cosine where the warm-up ends": curve(
            lambda s, w, n: (s + 1) / (w + 1), lambda s, w, n: (1 + math.cos(math.pi * (s - w) / (n - w))) / 2),
        "the warm-up begins at 0: step 0 has the share 0, not (step + 1) / warmup":
            curve(lambda s, w, n: (s + 1) / w),
        "the warm-up begins at 0: step 0 has the share 0, not 1 / (warmup + 1)":
            curve(lambda s, w, n: (s + 1) / (w + 1)),
        "the cosine counts from step 0, not from the end of the warm-up":
            fall(lambda s, w, n: (s - w) / (n - w)),
        "the cosine counts from step 0: it is step / total, not (step - warmup) / total":
            fall(lambda s, w, n: (s - w) / n),
        "the cosine is as long as all steps: divide by total, not by total - warmup":
            fall(lambda s, w, n: s / (n - w)),
        "the cosine's steps are divided by total, not by total - 1": fall(lambda s, w, n: s / (n - 1)),
        "the cosine runs a whole turn and climbs again; half a turn ends at zero": fall(lambda s, w, n: 2 * s / n),
        "the cosine runs a quarter of a turn; it takes half a turn, pi, to come to zero":
            curve(fall=lambda s, w, n: math.cos(math.pi / 2 * s / n)),
        "pi is missing: math.cos takes radians": fall(lambda s, w, n: s / n / math.pi),
        "the half is missing: 1 + cos falls from 2": curve(fall=lambda s, w, n: 1 + math.cos(math.pi * s / n)),
        "the 1 is missing: half of the cosine alone becomes negative":
            curve(fall=lambda s, w, n: math.cos(math.pi * s / n) / 2),
        "the cosine climbs: it is 1 + cos, not 1 - cos":
            curve(fall=lambda s, w, n: (1 - math.cos(math.pi * s / n)) / 2),
        "the warm-up goes on too long: step warmup is the cosine's": curve(last=1),
        "the warm-up climbs along the cosine; it is step / warmup alone": curve(product),
        "after the warm-up it falls along a straight line, not along a cosine": curve(fall=lambda s, w, n: 1 - s / n),
        "there is no warm-up": curve(lambda s, w, n: (1 + math.cos(math.pi * s / n)) / 2),
        "there is no cosine: after the warm-up the share stays 1": curve(fall=lambda s, w, n: 1.0),
        "// rounds down to whole numbers; the warm-up wants /": curve(lambda s, w, n: s // w),
    }
    compare(torch.tensor([number(answer(rate, *case)) for case in cases]), curve(), faults)


def check_average(average):
    """average(old, weights, decay): the moving average after one more step, a new tensor."""
    cases = [(random(5), random(5, seed=1), 0.9), (random(2, 3, seed=2).double(), random(2, 3, seed=3).double(), 0.6)]
    for old, weights, decay in cases:
        before, new = old.clone(), weights.clone()
        found = average(before, new, decay)  # not by answer, which gives copies
        if not torch.equal(before, old):
            raise WrongAnswer("old has changed: it was averaged in place, and whoever still needs it has lost it")
        if not torch.equal(new, weights):
            raise WrongAnswer("weights have changed: they are what the optimizer goes on with")
        compare_quietly(answer(lambda given: given, found), decay * old + (1 - decay) * weights, {
            "the weights have changed places: the decay is the share that stays": (1 - decay) * old + decay * weights,
            "the new weights are added without their share": decay * old + weights,
            "the old average keeps its whole weight; it must shrink to the share decay": old + (1 - decay) * weights,
            "that is a plain mean of the two": (old + weights) / 2,
            "the old average is given back as it was": old,
            "those are the new weights; the average moves towards them a little": weights,
            "the new weights are taken away, not added": decay * old - (1 - decay) * weights,
            "the average moves away from the weights: it is old + (1 - decay) * (weights - old)":
                old + (1 - decay) * (old - weights),
        })
    print("right")


def check_drop_rates(rates):
    """rates(depth, last): drop path's rate of each block, rising linearly from 0 to last."""
    for depth, last in ((6, 0.25), (4, 0.1), (2, 0.3)):
        found = answer(rates, depth, last)
        try:
            found = torch.tensor([float(rate) for rate in found])
        except TypeError:
            raise WrongAnswer(f"it returned {found!r}, not a list of rates, one for each block") from None
        if len(found) != depth:
            raise WrongAnswer(f"it returned {len(found)} rates for {depth} blocks")
        index = torch.arange(depth)
        compare_quietly(found, last * index / (depth - 1), {
            "every block has the same rate; it must rise from 0 at the first": torch.full((depth,), last),
            "the last block does not reach the rate: divide by depth - 1": last * index / depth,
            "the first block has a rate above zero": last * (index + 1) / depth,
            "the rates fall; they must rise": last * (depth - 1 - index) / (depth - 1),
            "they rise from 0 to 1: multiply by last": index / (depth - 1),
            "each block is as far from the one before as last; the last one alone has that rate": last * index,
            "they rise along a square, not along a line": last * (index / (depth - 1)) ** 2,
            "those are the shares that stay, 1 - rate": 1 - last * index / (depth - 1),
        })
    print("right")


class Small(nn.Module):
    """A network with every kind of parameter that a Refiner-ViT has."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.class_token, self.position = (nn.Parameter(torch.randn(1, count, dim)) for count in (1, 5))
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 4, bias=False), nn.BatchNorm2d(dim))
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 7)
        self.scale = nn.Parameter(torch.ones(dim))


def check_groups(groups):
    """groups(network): two lists of its parameters, those that weight decay pulls at and those that it does not."""
    for dim, depth in ((6, 2), (4, 1)):
        network = Small(dim, depth)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        found = answer(groups, network)
        try:
            decay, rest = ([names[id(parameter)] for parameter in group] for group in found)
        except (TypeError, ValueError, KeyError):
            raise WrongAnswer("it must return two lists of the network's parameters, decay and rest") from None
        if twice := [name for name in decay + rest if (decay + rest).count(name) > 1]:
            raise WrongAnswer(f"{twice[0]} is in it twice: an optimizer would move it twice")
        if missing := [name for name in names.values() if name not in decay + rest]:
            raise WrongAnswer(f"{missing[0]} is in no list: it would never be trained")
        right = [name for name in names.values() if name.endswith("weight") and not name.startswith(("norm", "stem.1"))]
        if set(decay) == set(names.values()) - set(right):
            raise WrongAnswer("the two lists have changed places: decay comes first")
        for kind, why in {
            ".bias": "a bias decays: of one dimension are biases, norms and scales, and they do not",
            "norm.weight": "a norm's weight decays: its name ends in weight, but it has one dimension",
            "stem.1.weight": "a BatchNorm's weight decays: its name ends in weight, but it has one dimension",
            "scale": "a scale decays: it has one dimension",
            "class_token": "the class token decays: it has three dimensions, but it is no matrix; go by its name",
            "position": "the positions decay: they have three dimensions, but are no matrix; go by their name",
        }.items():
            if any(name.endswith(kind) for name in decay):
                raise WrongAnswer(why)
        for name in right:
            if name not in decay:
                raise WrongAnswer(f"{name} does not decay: kernels are of four dimensions, matrices of two; both do")
    print("right")


def check_cutmix_labels(cutmix_labels):
    """cutmix_labels(image, tokens, box, size): (B, K), (B, T, K), a box of pixels of size x size -> both, mixed: the
    image's by area, a token's is that of what covers its centre."""
    def by_area(image, box, size, share=None):
        row0, col0, row1, col1 = box
        share = (row1 - row0) * (col1 - col0) / size**2 if share is None else share(*box, size)
        return (1 - share) * image + share * image.flip(0)

    def by_centre(tokens, box, size, covers=lambda place, low, high, patch: low <= (place + 0.5) * patch < high):
        row0, col0, row1, col1 = box
        grid = math.isqrt(tokens.shape[1])
        rows, cols = (torch.tensor([covers(place, *ends, size / grid) for place in range(grid)])
                      for ends in ((row0, row1), (col0, col1)))
        return torch.where((rows[:, None] & cols).flatten()[:, None], tokens.flip(0), tokens)

    def turned(box):
        return box[1], box[0], box[3], box[2]

    image_faults = {
        "own and partner have changed places: the box's share is the partner's": lambda image, *where:
            by_area(image.flip(0), *where),
        "the partner is the picture at the other end of the batch: flip(0), not the next one": lambda image, box, size:
            torch.lerp(image, image.roll(1, 0), (box[2] - box[0]) * (box[3] - box[1]) / size**2),
        "flip(1) turns the classes round; the batch is dimension 0": lambda image, box, size:
            torch.lerp(image, image.flip(1), (box[2] - box[0]) * (box[3] - box[1]) / size**2),
        "the box is half open: its sides are row1 - row0 and col1 - col0": lambda *case: by_area(
            *case, share=lambda r0, c0, r1, c1, size: (r1 - r0 + 1) * (c1 - c0 + 1) / size**2),
        "the share is that of the box's sides, not of its area": lambda *case: by_area(
            *case, share=lambda r0, c0, r1, c1, size: (r1 - r0 + c1 - c0) / (2 * size)),
        "the box's area is divided by size; the picture has size * size pixels": lambda *case: by_area(
            *case, share=lambda r0, c0, r1, c1, size: (r1 - r0) * (c1 - c0) / size),
        "the image's labels are not mixed": lambda image, *where: image,
        "the whole label is the partner's; it is mixed by area": lambda image, *where: image.flip(0),
    }
    token_faults = {
        "own and partner have changed places: inside of the box is the partner": lambda tokens, *where:
            by_centre(tokens.flip(0), *where),
        "rows and columns have changed places: token t is in row t // grid": lambda tokens, box, size:
            by_centre(tokens, turned(box), size),
        "a centre is half a patch further than its patch's corner": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low <= place * patch < high),
        "the box is half open: a centre at row1 or col1 is outside": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low <= (place + 0.5) * patch <= high),
        "the box is half open: a centre at row0 or col0 is inside": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low < (place + 0.5) * patch < high),
        "every token that the box touches is replaced; only those whose centre it covers are": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low < (place + 1) * patch and place * patch < high),
        "only tokens that lie in the box whole are replaced; it is the centre that decides": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low <= place * patch and (place + 1) * patch <= high),
        "the box is in pixels, and was taken for tokens": lambda *case: by_centre(
            *case, lambda place, low, high, patch: low <= place < high),
        "the tokens' labels are mixed by area, as in the published code; here each keeps one picture's":
            lambda tokens, box, size: by_area(tokens, box, size),
        "the partner is the picture at the other end of the batch: flip(0), not the next one": lambda tokens, *where:
            torch.where(by_centre(torch.arange(2.0)[:, None, None].expand(2, tokens.shape[1], 1), *where)[:1] > 0,
                        tokens.roll(1, 0), tokens),
        "flip(1) turns the tokens round; the batch is dimension 0": lambda tokens, *where:
            torch.where(by_centre(torch.arange(2.0)[:, None, None].expand(2, tokens.shape[1], 1), *where)[:1] > 0,
                        tokens.flip(1), tokens),
        "the tokens' labels are those before": lambda tokens, *where: tokens,
        "every token takes its partner's label, in the box or not": lambda tokens, *where: tokens.flip(0),
    }
    cases = [((3, 5), (3, 16, 5), (3, 2, 15, 19), 24), ((5, 4), (5, 9, 4), (0, 8, 9, 20), 21),
             ((3, 5), (3, 25, 5), (9, 2, 14, 9), 20)]
    for image_shape, tokens_shape, box, size in cases:
        image, tokens = (random(*shape).softmax(dim=-1) for shape in (image_shape, tokens_shape))
        found = answer(cutmix_labels, image, tokens, box, size)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            raise WrongAnswer("it must return two tensors, the image's labels and the tokens'")
        for part, before, faults, right in (("of the images, ", image, image_faults, by_area),
                                            ("of the tokens, ", tokens, token_faults, by_centre)):
            said_with(part, compare_quietly, found[part == "of the tokens, "], right(before, box, size),
                      {sentence: of(before, box, size) for sentence, of in faults.items()})
    print("right")
