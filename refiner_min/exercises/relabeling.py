"""The checks of notebooks/04_relabeling.ipynb."""

import math

import torch
import torch.nn.functional as F

from refiner_min.exercises import WrongAnswer, answer, compare, compare_cases, compare_quietly, number, random


def check_spread_out(spread_out):
    """spread_out(logits, ids, num_classes): (B, k, H, W) each -> (B, K, H, W), logit 0 for what is not kept."""
    def filled(logits, ids, count, value=0.0):
        return torch.full((logits.shape[0], count, *logits.shape[2:]), value).scatter(1, ids, logits)

    cases = [(*random(2, 7, 3, 5).topk(3, dim=1), 7), (*random(3, 6, 4, 2, seed=1).topk(2, dim=1), 6)]
    compare_cases(spread_out, cases, filled, {
        "the classes that are left out are -inf; the published code, and ours, count them as logit 0":
            lambda *case: filled(*case, -torch.inf),
        "there is a softmax already; it comes after the pooling": lambda *case: filled(*case).softmax(dim=1),
        "the logits are put in the order of their rank, not at their class":
            lambda logits, ids, count: F.pad(logits, (0, 0, 0, 0, 0, count - logits.shape[1])),
        "every cell has the classes of the first one: ids differ from cell to cell": lambda logits, ids, count:
            filled(logits, ids[:1, :, :1, :1].expand_as(ids), count),
        "there is a 1 at each class that is kept; its logit belongs there":
            lambda logits, ids, count: filled(torch.ones_like(logits), ids, count),
        "the classes are put in the place of the logits": lambda logits, ids, count: filled(ids.float(), ids, count),
        "the classes are in the last dimension; the result is (B, K, H, W)":
            lambda *case: filled(*case).permute(0, 2, 3, 1),
    })


def check_read(read):
    """read(cells, y, x): a map (K, H, W) at a point, in cells -> (K,), linear between the four nearest centres."""
    def corner(place, size):
        low = min(int(max(place, 0)), size - 1)
        return low, min(low + 1, size - 1)

    def between(cells, y, x, half=0.5, weight=float, clamp=True, least=0.0):
        mixed = cells
        for place, size in ((y - half, cells.shape[1]), (x - half, cells.shape[2])):
            low, high = corner(place, size) if clamp else (math.floor(place), (math.floor(place) + 1) % size)
            share = weight(max(place, least) - low if clamp else place - low)
            mixed = (1 - share) * mixed[:, low] + share * mixed[:, high]
        return mixed

    points = [(2.3, 1.9), (1.6, 2.8), (2.5, 3.1), (1.5, 1.5), (0.2, 2.2), (3.8, 1.7), (1.9, 0.1), (2.2, 5.9)]
    cases = [(random(3, 4, 6, seed=index), *point) for index, point in enumerate(points)]
    try:
        compare_cases(read, cases, between, {
            "a cell's centre is at its index plus a half: at y = 0.5 stands what row 0 says":
                lambda *case: between(*case, half=0.0),
            "the half is added, where it must be taken off": lambda *case: between(*case, half=-0.5),
            "x and y have changed places: cells are [class, row, column], and y is the row":
                lambda cells, y, x: between(cells, x, y),
            "that is the nearest cell alone; the four around the point are mixed":
                lambda *case: between(*case, weight=round),
            "that is the plain mean of the four cells; the nearer one must weigh more":
                lambda *case: between(*case, weight=lambda share: 0.5),
            "the weights are the wrong way round: the nearer cell has the larger one":
                lambda *case: between(*case, weight=lambda share: 1 - share),
            "at the border, the weights go below 0 or above 1: nothing is nearer than the outermost centre":
                lambda *case: between(*case, least=-math.inf),
            "at the border, cells outside of the map count as 0; the outermost one counts again":
                lambda cells, y, x: between(F.pad(cells, (1, 1, 1, 1)), y + 1, x + 1),
            "at the border, a cell of the other end is mixed in: an index of -1 is the last one":
                lambda *case: between(*case, clamp=False),
        })
    except IndexError as error:
        raise WrongAnswer(f"at the border there is no such cell ({error}): the outermost one is read twice") from None


def check_compose(compose):
    """compose(outer, inner): boxes (4,) x1, y1, x2, y2; inner in fractions of outer -> in those of the whole."""
    def sides(box):
        return (box[2:] - box[:2]).repeat(2)

    def composed(outer, inner):
        return outer[:2].repeat(2) + inner * sides(outer)

    cases = [(torch.tensor([0.2, 0.1, 0.8, 0.5]), torch.tensor([0.5, 0.25, 1.0, 0.75])),
             (torch.tensor([0.05, 0.3, 0.35, 0.9]), torch.tensor([0.1, 0.0, 0.6, 0.4]))]
    compare_cases(compose, cases, composed, {
        "the inner box is scaled but not moved: it starts at the outer one's corner":
            lambda outer, inner: inner * sides(outer),
        "the inner box is moved but not scaled": lambda outer, inner: outer[:2].repeat(2) + inner,
        "width and height have changed places": lambda outer, inner:
            outer[:2].repeat(2) + inner * sides(outer).roll(1),
        "the two boxes are multiplied": lambda outer, inner: outer * inner,
        "the boxes have changed places: inner is what is given in fractions of outer":
            lambda outer, inner: composed(inner, outer),
        "that is the way back, from fractions of the picture to those of outer":
            lambda outer, inner: (inner - outer[:2].repeat(2)) / sides(outer),
        "a box ends at its x2 and y2; these are its width and height":
            lambda outer, inner: torch.cat([composed(outer, inner)[:2], sides(inner)[:2] * sides(outer)[:2]]),
        "inner is scaled by outer's x2 and y2; its sides are x2 - x1 and y2 - y1":
            lambda outer, inner: outer[:2].repeat(2) + inner * outer[2:].repeat(2),
        "the second corner is counted from outer's second corner; both are from its first":
            lambda outer, inner: outer + inner * sides(outer),
    })


def check_mirror_overlap(overlap):
    """overlap(box): box (4,) x1, y1, x2, y2 -> intersection over union with its mirror image across the diagonal."""
    def over(box, clamp=True, union=2, own=True, mirror=(1, 0, 3, 2)):
        low, high = torch.maximum(box, box[list(mirror)])[:2], torch.minimum(box, box[list(mirror)])[2:]
        width, height = (high - low).clamp(min=0 if clamp else -torch.inf)
        area = (box[2] - box[0]) * (box[3] - box[1])
        return width * height / (union * area - (width * height if own else 0))

    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5], [0.6, 0.0, 0.9, 0.2]])
    found = torch.tensor([number(answer(overlap, box)) for box in boxes])
    compare(found, torch.stack([over(box) for box in boxes]), {sentence: torch.stack([of(box) for box in boxes])
                                                               for sentence, of in {
        "boxes that do not meet have an intersection too: a side below zero counts as zero":
            lambda box: over(box, clamp=False),
        "the sum of the areas is no union: what both cover is counted twice in it": lambda box: over(box, own=False),
        "the intersection is divided by the box's own area, not by the union":
            lambda box: over(box, union=1, own=False),
        "that is the intersection; it must still be divided by the union": lambda box:
            over(box, union=1, own=False) * (box[2] - box[0]) * (box[3] - box[1]),
        "one minus it: that is how much the boxes differ": lambda box: 1 - over(box),
        "it is in percent; a share from 0 to 1 is asked for": lambda box: 100 * over(box),
        "the box is mirrored from left to right; the mirror image is (y1, x1, y2, x2)":
            lambda box: flipped(box, 0),
        "the box is mirrored from top to bottom; the mirror image is (y1, x1, y2, x2)":
            lambda box: flipped(box, 1),
        "the union is of two boxes: twice the area, less what both cover": lambda box: over(box, union=1),
    }.items()})


def flipped(box, axis: int):
    """The intersection over union of a box with its mirror image along an axis, 0: x."""
    low, high = box[axis], box[axis + 2]
    side = (torch.minimum(high, 1 - low) - torch.maximum(low, 1 - high)).clamp(min=0)
    return side / (2 * (high - low) - side)


def check_mixed_label(mixed_label):
    """mixed_label(labels, box, grid): (B, K) and MixToken's box -> the labels of the mixed pictures, (B, K)."""
    def mixed(labels, box, grid, share=None, partner=None):
        row0, col0, row1, col1 = box
        share = (row1 - row0) * (col1 - col0) / grid**2 if share is None else share(*box, grid)
        return (1 - share) * labels + share * (labels.flip(0) if partner is None else partner(labels))

    cases = [(F.one_hot(torch.tensor([0, 2, 1]), 5).float(), (1, 0, 4, 2), 8),
             (random(5, 4).softmax(dim=1), (2, 3, 4, 6), 7)]
    compare_cases(mixed_label, cases, mixed, {
        "own and partner have changed places: the box's share is the partner's":
            lambda labels, *where: mixed(labels.flip(0), *where),
        "the partner is the picture at the other end of the batch: flip(0), not the next one":
            lambda *case: mixed(*case, partner=lambda labels: labels.roll(1, 0)),
        "the partner is the picture at the other end of the batch: flip(0), not the one before":
            lambda *case: mixed(*case, partner=lambda labels: labels.roll(-1, 0)),
        "flip(1) turns the classes round; the batch is dimension 0":
            lambda *case: mixed(*case, partner=lambda labels: labels.flip(1)),
        "the box is half open: it ends before row1 and col1, so its sides are row1 - row0 and col1 - col0":
            lambda *case: mixed(*case, share=lambda r0, c0, r1, c1, grid: (r1 - r0 + 1) * (c1 - c0 + 1) / grid**2),
        "the share is that of the box's sides, not of its area":
            lambda *case: mixed(*case, share=lambda r0, c0, r1, c1, grid: (r1 - r0 + c1 - c0) / (2 * grid)),
        "the box's area is divided by grid; the grid has grid * grid tokens":
            lambda *case: mixed(*case, share=lambda r0, c0, r1, c1, grid: (r1 - r0) * (c1 - c0) / grid),
        "the box is (row0, col0, row1, col1), one corner after the other: its first two numbers are no side":
            lambda *case: mixed(*case, share=lambda r0, c0, r1, c1, grid: (c0 - r0) * (c1 - r1) / grid**2),
        "half of each: the partner's share is that of the box":
            lambda *case: mixed(*case, share=lambda *box: 0.5),
        "the partner's part is missing": lambda labels, *where:
            mixed(labels, *where, partner=torch.zeros_like),
        "the partner's label is added to the whole own one, which keeps only 1 - s": lambda labels, *where:
            labels + mixed(torch.zeros_like(labels), *where, partner=lambda _: labels.flip(0)),
        "the labels are not mixed": lambda labels, *where: labels,
    })


def check_masked_token_loss(loss):
    """loss(token_logits, labels): (B, T, K) each -> soft cross-entropy, the mean over the tokens that have a label."""
    def each(logits, labels):
        return -(labels * logits.log_softmax(dim=2)).sum(dim=2)  # (B, T)

    def masked(logits, labels):
        return each(logits, labels).sum() / (labels.sum(dim=2) > 0).sum().clamp(min=1)

    def by_picture(logits, labels):
        return (each(logits, labels).sum(dim=1) / (labels.sum(dim=2) > 0).sum(dim=1).clamp(min=1)).mean()

    def first_class(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.argmax(dim=2).flatten())

    def hard(logits, labels):
        return masked(logits, F.one_hot(labels.argmax(dim=2), labels.shape[2]) * (labels.sum(dim=2, keepdim=True) > 0))

    labels, other = 3 * random(3, 7, 5, seed=1), 3 * random(2, 4, 6, seed=3)  # of unlike sharpness
    labels, other = labels.softmax(dim=2), other.softmax(dim=2)
    labels[0, :5], labels[1, 3], other[1, 1:] = 0, 0, 0
    cases = [(2 * random(3, 7, 5), labels), (2 * random(2, 4, 6, seed=2), other)]
    wrong = {
        "the mean is over all tokens; those without a label must not count in it": lambda *case: each(*case).mean(),
        "the mean is over each picture, then over the pictures; it is over the tokens of the whole batch": by_picture,
        "a token without a label counts as class 0: argmax of zeros is 0": first_class,
        "only the likeliest class of each label counts; the labels are probabilities": hard,
        "that is the sum; divide by the number of tokens that have a label": lambda *case: each(*case).sum(),
        "the sum is divided by the pictures; it is the tokens that have a label that count":
            lambda logits, labels: each(logits, labels).sum() / len(logits),
        "the mean is over the classes too; the sum over the classes is a token's loss":
            lambda logits, labels: masked(logits, labels) / logits.shape[2],
        "the minus sign is missing": lambda *case: -masked(*case),
        "the softmax is there, its logarithm is not": lambda logits, labels:
            -(labels * logits.softmax(dim=2)).sum() / (labels.sum(dim=2) > 0).sum(),
        "there is a softmax before the cross-entropy, which takes one itself":
            lambda logits, labels: masked(logits.softmax(dim=2), labels),
        "the softmax runs over the tokens; the classes are the last dimension": lambda logits, labels:
            -(labels * logits.log_softmax(dim=1)).sum() / (labels.sum(dim=2) > 0).sum(),
        "that is the divergence from the labels (KL): it is smaller by their own entropy": lambda logits, labels:
            masked(logits, labels) + torch.special.xlogy(labels, labels).sum() / (labels.sum(dim=2) > 0).sum(),
        "it is halved: dense_weight comes later": lambda *case: masked(*case) / 2,
    }
    found = torch.tensor([number(answer(loss, *case)) for case in cases])
    compare_quietly(found, torch.stack([masked(*case) for case in cases]),
                    {sentence: torch.stack([of(*case) for case in cases]) for sentence, of in wrong.items()})
    large = 200 * torch.eye(6).expand(1, 6, 6)
    if not math.isclose(number(answer(loss, large, large.flip(2) / 200)), 200, rel_tol=1e-3):
        raise WrongAnswer("with logits of 200 it is not 200: the softmax came to zero before its logarithm was taken; "
                          "log_softmax takes both at once")
    half = torch.cat([large[:, :3], large[:, 3:].flip(2)], dim=1) / 200  # the first three tokens are right: 0 each
    if not math.isclose(number(answer(loss, large, half)), 100, rel_tol=1e-3):
        raise WrongAnswer("where half of the tokens are surely right it is not 100: tokens count by their labels, not "
                          "by their losses")
    none = number(answer(loss, cases[0][0], torch.zeros(3, 7, 5)))
    if none != 0:
        raise WrongAnswer(f"without any label it is {none:g}, not 0: divide by at least 1")
    found = loss(cases[0][0].clone().requires_grad_(), labels.clone())
    if not (isinstance(found, torch.Tensor) and found.requires_grad):
        raise WrongAnswer("nothing can be learnt from it: it must stay a tensor, which knows its gradient")
    print("right")
