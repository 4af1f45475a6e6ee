"""The checks of notebooks/04_relabeling.ipynb."""

import torch
import torch.nn.functional as F

from refiner_min.exercises import answer, compare, random


def check_spread_out(spread_out):
    """spread_out(logits, ids, num_classes): (B, k, H, W) each -> (B, K, H, W), logit 0 for what is not kept."""
    scores = random(2, 6, 3, 4)
    logits, ids = scores.topk(3, dim=1)
    right = torch.zeros(2, 6, 3, 4).scatter(1, ids, logits)
    compare(answer(spread_out, logits, ids, 6), right, {
        "the classes that are left out are -inf; the published code, and ours, count them as logit 0":
            torch.full((2, 6, 3, 4), -torch.inf).scatter(1, ids, logits),
        "there is a softmax already; it comes after the pooling": right.softmax(dim=1),
        "the logits are put in the order of their rank, not at their class": F.pad(logits, (0, 0, 0, 0, 0, 3)),
    })


def check_compose(compose):
    """compose(outer, inner): boxes (4,) x1, y1, x2, y2; inner in fractions of outer -> in those of the whole."""
    outer, inner = torch.tensor([0.2, 0.1, 0.8, 0.5]), torch.tensor([0.5, 0.25, 1.0, 0.75])
    sides, swapped = (outer[2:] - outer[:2]).repeat(2), (outer[2:] - outer[:2]).flip(0).repeat(2)
    compare(answer(compose, outer, inner), outer[:2].repeat(2) + inner * sides, {
        "the inner box is scaled but not moved: it starts at the outer one's corner": inner * sides,
        "the inner box is moved but not scaled": outer[:2].repeat(2) + inner,
        "width and height have changed places": outer[:2].repeat(2) + inner * swapped,
        "the two boxes are multiplied": outer * inner,
    })


def check_mirror_overlap(overlap):
    """overlap(box): box (4,) x1, y1, x2, y2 -> intersection over union with its mirror image across the diagonal."""
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5], [0.6, 0.0, 0.9, 0.2]])
    x1, y1, x2, y2 = boxes.T
    area, side = (x2 - x1) * (y2 - y1), torch.minimum(x2, y2) - torch.maximum(x1, y1)
    met = side.clamp(min=0) ** 2
    compare(torch.stack([torch.as_tensor(answer(overlap, box)) for box in boxes]), met / (2 * area - met), {
        "boxes that do not meet have an intersection too: a side below zero counts as zero":
            side**2 / (2 * area - side**2),
        "the sum of the areas is no union: what both cover is counted twice in it": met / (2 * area),
        "the intersection is divided by the box's own area, not by the union": met / area,
    })


def check_mixed_label(mixed_label):
    """mixed_label(labels, box, grid): (B, K) and MixToken's box -> the labels of the mixed pictures, (B, K)."""
    labels, box = F.one_hot(torch.tensor([0, 2, 1, 4]), 5).float(), (1, 0, 4, 2)
    share = 6 / 16
    compare(answer(mixed_label, labels, box, 4), (1 - share) * labels + share * labels.flip(0), {
        "own and partner have changed places: the box's share is the partner's":
            share * labels + (1 - share) * labels.flip(0),
        "the partner is the picture at the other end of the batch: flip(0), not the next one":
            (1 - share) * labels + share * labels.roll(1, 0),
        "the share is that of the box's sides, not of its area": (1 - 5 / 8) * labels + 5 / 8 * labels.flip(0),
        "the labels are not mixed": labels,
    })
