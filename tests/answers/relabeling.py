import math

import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from refiner_min.relabel import Labels, TokenLabelLoss


def spread_out(logits, ids, count):
    return torch.zeros(logits.shape[0], count, *logits.shape[2:]).scatter(1, ids, logits)


def spread_out_by_loops(logits, ids, count):
    out = torch.zeros(len(logits), count, *logits.shape[2:])
    for index in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        b, k, y, x = index
        out[b, ids[b, k, y, x], y, x] = logits[b, k, y, x]
    return out


def spread_out_by_products(logits, ids, count):
    return torch.einsum("bkhw,bkhwc->bchw", logits, F.one_hot(ids, count).float())


def read(cells, y, x, half=0.5, share=float, limit=True):
    y, x = (max(place - half, 0) if limit else place - half for place in (y, x))
    row, col = math.floor(y), math.floor(x)
    if limit:
        row, col = min(row, cells.shape[1] - 1), min(col, cells.shape[2] - 1)
    below, right = min(row + 1, cells.shape[1] - 1), min(col + 1, cells.shape[2] - 1)
    dy, dx = share(y - row), share(x - col)
    return ((1 - dy) * ((1 - dx) * cells[:, row, col] + dx * cells[:, row, right])
            + dy * ((1 - dx) * cells[:, below, col] + dx * cells[:, below, right]))


def read_by_torch(cells, y, x, padding="border"):
    height, width = cells.shape[1:]
    place = torch.tensor([2 * x / width - 1, 2 * y / height - 1]).view(1, 1, 1, 2)
    return F.grid_sample(cells[None], place, padding_mode=padding, align_corners=False).flatten()


def read_beyond(cells, y, x):
    """int(-0.3) is 0, and -0.3 the share that is left."""
    row, col = int(y - 0.5), int(x - 0.5)
    dy, dx = y - 0.5 - row, x - 0.5 - col
    below, right = min(row + 1, cells.shape[1] - 1), min(col + 1, cells.shape[2] - 1)
    upper, lower = ((1 - dx) * cells[:, index, col] + dx * cells[:, index, right] for index in (row, below))
    return (1 - dy) * upper + dy * lower


def compose(outer, inner):
    return outer[:2].repeat(2) + inner * (outer[2:] - outer[:2]).repeat(2)


def compose_by_number(outer, inner):
    x1, y1, x2, y2 = outer.tolist()
    a, b, c, d = inner.tolist()
    width, height = x2 - x1, y2 - y1
    return torch.tensor([x1 + a * width, y1 + b * height, x1 + c * width, y1 + d * height])


def mirror_overlap(box, clamp=True, union=True):
    x1, y1, x2, y2 = box.tolist()
    side = min(x2, y2) - max(x1, y1)
    met = max(side, 0) ** 2 if clamp else side**2
    return met / (2 * (x2 - x1) * (y2 - y1) - (met if union else 0))


def overlap_of(box, mirror):
    return box_iou(box[None], torch.stack(mirror(*box))[None])


def mixed_label(labels, box, grid, share=None):
    row0, col0, row1, col1 = box
    share = (row1 - row0) * (col1 - col0) / grid**2 if share is None else share
    return (1 - share) * labels + share * labels.flip(0)


def mixed_by_loops(labels, box, grid):
    row0, col0, row1, col1 = box
    share = (row1 - row0) * (col1 - col0) / grid**2
    return torch.stack([(1 - share) * label + share * partner for label, partner in zip(labels, reversed(labels))])


def mixed_with(partner):
    def mixed(labels, box, grid):
        share = (box[2] - box[0]) * (box[3] - box[1]) / grid**2
        return (1 - share) * labels + share * partner(labels)
    return mixed


def mixed_by(share):
    return lambda labels, box, grid: mixed_label(labels, box, grid, share(*box, grid))


def token_loss(logits, labels, log=lambda logits: logits.log_softmax(dim=2), mean=None):
    losses, there = -(labels * log(logits)).sum(dim=2), labels.sum(dim=2) > 0
    return mean(losses, there) if mean else losses.sum() / there.sum().clamp(min=1)


def loss_of_the_package(logits, labels):
    zeros = torch.zeros(logits.shape[0], logits.shape[2])  # with labels of zero, the class token's loss is none
    return TokenLabelLoss(dense_weight=1.0)((zeros, logits), Labels(zeros, labels))


def loss_of_those_with_one(logits, labels):
    there = labels.sum(dim=2) > 0
    return F.cross_entropy(logits[there], labels[there]) if there.any() else 0.0


def loss_by_loops(logits, labels):
    losses = [-(label @ scores.log_softmax(dim=0)) for picture, named in zip(logits, labels)
              for scores, label in zip(picture, named) if label.sum() > 0]
    return sum(losses, torch.zeros(())) / max(len(losses), 1)


def hard_loss(logits, labels):
    there = labels.sum(dim=2) > 0
    return F.cross_entropy(logits[there], labels[there].argmax(dim=1))


def kl(logits, labels):
    there = labels.sum(dim=2) > 0
    return F.kl_div(logits[there].log_softmax(dim=1), labels[there], reduction="batchmean")


RIGHT = {
    "spread_out": [spread_out, spread_out_by_loops, spread_out_by_products],
    "read": [read, read_by_torch],
    "compose": [compose, compose_by_number, lambda outer, inner: torch.lerp(
        outer[:2].repeat(2), outer[2:].repeat(2), inner)],
    "mirror_overlap": [mirror_overlap, lambda box: torch.tensor(mirror_overlap(box)),
                       lambda box: torch.tensor([mirror_overlap(box)]),
                       lambda box: box_iou(box[None], box[None, [1, 0, 3, 2]])],
    "mixed_label": [mixed_label, mixed_by_loops, lambda labels, *where: labels.copy_(mixed_label(labels, *where))],
    "masked_token_loss": [token_loss, loss_of_the_package, loss_of_those_with_one, loss_by_loops,
                          lambda logits, labels: token_loss(logits, labels).reshape(1)],
}
WRONG = [
    ("spread_out", lambda *case: spread_out(*case).softmax(dim=1), "a softmax already"),
    ("spread_out", lambda logits, ids, count: F.pad(logits, (0, 0, 0, 0, 0, count - logits.shape[1])), "of their rank"),
    ("spread_out", lambda logits, ids, count: torch.full((len(logits), count, *logits.shape[2:]), -torch.inf).scatter(
        1, ids, logits), "left out are -inf"),
    ("spread_out", lambda logits, ids, count: spread_out(logits, ids[:1, :, :1, :1].expand_as(ids), count),
     "the classes of the first one"),
    ("spread_out", lambda logits, ids, count: spread_out(torch.ones_like(logits), ids, count), "a 1 at each class"),
    ("spread_out", lambda logits, ids, count: spread_out(ids.float(), ids, count), "in the place of the logits"),
    ("spread_out", lambda *case: spread_out(*case).permute(0, 2, 3, 1), "in the last dimension"),
    ("spread_out", lambda *case: None, "it returned nothing"),
    ("spread_out", lambda logits, ids, count: (spread_out(logits, ids, count), ids), "a tuple of 2, not one tensor"),
    ("spread_out", lambda logits, ids, count: spread_out(logits, ids, 7)[:, :7], "the shape .3, 7, 4, 2., not .3, 6"),
    ("read", lambda cells, y, x: read(cells, y, x, half=0), "at its index plus a half"),
    ("read", lambda cells, y, x: read(cells, y, x, half=-0.5), "the half is added"),
    ("read", lambda cells, y, x: read(cells, x, y), "x and y have changed places"),
    ("read", lambda cells, y, x: read(cells, y, x, share=round), "the nearest cell alone"),
    ("read", lambda cells, y, x: cells[:, int(y), int(x)], "the nearest cell alone"),
    ("read", lambda cells, y, x: read(cells, y, x, share=lambda part: 0.5), "plain mean of the four"),
    ("read", lambda cells, y, x: read(cells, y, x, share=lambda part: 1 - part), "the wrong way round"),
    ("read", lambda cells, y, x: read(cells, y, x, limit=False), "an index of -1 is the last one"),
    ("read", read_beyond, "below 0 or above 1"),
    ("read", lambda *case: read_by_torch(*case, padding="zeros"), "outside of the map count as 0"),
    ("read", lambda cells, y, x: torch.ones(3), "the same for every input"),
    ("read", lambda cells, y, x: cells[:, int(y + 0.5), int(x)], "at the border there is no such cell"),
    ("read", lambda cells, y, x: read(cells, y, x)[:, None], "the shape .3, 1., not .3,"),
    ("read", lambda cells, y, x: read(cells, y, x).tolist(), "a list of 3, not one tensor"),
    ("compose", lambda outer, inner: inner * (outer[2:] - outer[:2]).repeat(2), "scaled but not moved"),
    ("compose", lambda outer, inner: outer[:2].repeat(2) + inner, "moved but not scaled"),
    ("compose", lambda outer, inner: outer[:2].repeat(2) + inner * (outer[2:] - outer[:2]).flip(0).repeat(2),
     "width and height have changed places"),
    ("compose", lambda outer, inner: outer * inner, "multiplied"),
    ("compose", lambda outer, inner: compose(inner, outer), "the boxes have changed places"),
    ("compose", lambda outer, inner: (inner - outer[:2].repeat(2)) / (outer[2:] - outer[:2]).repeat(2), "the way back"),
    ("compose", lambda outer, inner: torch.cat([compose(outer, inner)[:2], (compose(outer, inner)[2:]
                                                                            - compose(outer, inner)[:2])]),
     "these are its width and height"),
    ("compose", lambda outer, inner: outer[:2].repeat(2) + inner * outer[2:].repeat(2), "scaled by outer's x2 and y2"),
    ("compose", lambda outer, inner: outer + inner * (outer[2:] - outer[:2]).repeat(2), "from outer's second corner"),
    ("compose", lambda outer, inner: tuple(compose(outer, inner)), "a tuple of 4, not one tensor"),
    ("compose", lambda outer, inner: torch.tensor([0.5, 0.2, 0.8, 0.4]), "the same for every input"),
    ("compose", lambda outer, inner: compose(outer, inner)[:2], "the shape .2,., not .4,."),
    ("mirror_overlap", lambda box: mirror_overlap(box, clamp=False), "do not meet"),
    ("mirror_overlap", lambda box: mirror_overlap(box, union=False), "is no union"),
    ("mirror_overlap", lambda box: 2 * mirror_overlap(box, union=False), "by the box's own area"),
    ("mirror_overlap", lambda box: max(min(box[2], box[3]) - max(box[0], box[1]), 0) ** 2, "that is the intersection"),
    ("mirror_overlap", lambda box: 1 - mirror_overlap(box), "how much the boxes differ"),
    ("mirror_overlap", lambda box: 100 * mirror_overlap(box), "in percent"),
    ("mirror_overlap", lambda box: overlap_of(box, lambda x1, y1, x2, y2: [1 - x2, y1, 1 - x1, y2]),
     "from left to right"),
    ("mirror_overlap", lambda box: overlap_of(box, lambda x1, y1, x2, y2: [x1, 1 - y2, x2, 1 - y1]),
     "from top to bottom"),
    ("mirror_overlap", lambda box: 1.0, "differ"),
    ("mirror_overlap", lambda box: 0.0, "differ"),
    ("mirror_overlap", lambda box: (mirror_overlap(box), 0), "a tuple of 2, not a number"),
    ("mixed_label", mixed_by(lambda r0, c0, r1, c1, grid: 1 - (r1 - r0) * (c1 - c0) / grid**2), "own and partner"),
    ("mixed_label", lambda labels, box, grid: labels, "are not mixed"),
    ("mixed_label", mixed_with(lambda labels: labels.roll(1, 0)), "not the next one"),
    ("mixed_label", mixed_with(lambda labels: labels.roll(-1, 0)), "not the one before"),
    ("mixed_label", mixed_with(lambda labels: labels.flip(1)), r"flip\(1\) turns the classes"),
    ("mixed_label", mixed_by(lambda r0, c0, r1, c1, grid: (r1 - r0 + 1) * (c1 - c0 + 1) / grid**2), "half open"),
    ("mixed_label", mixed_by(lambda r0, c0, r1, c1, grid: (r1 - r0 + c1 - c0) / (2 * grid)), "not of its area"),
    ("mixed_label", mixed_by(lambda r0, c0, r1, c1, grid: (r1 - r0) * (c1 - c0) / grid), "grid . grid tokens"),
    ("mixed_label", mixed_by(lambda r0, r1, c0, c1, grid: (r1 - r0) * (c1 - c0) / grid**2), "are no side"),
    ("mixed_label", mixed_by(lambda *box: 0.5), "half of each"),
    ("mixed_label", mixed_with(torch.zeros_like), "the partner's part is missing"),
    ("mixed_label", lambda labels, box, grid: labels + mixed_with(lambda _: labels.flip(0))(0 * labels, box, grid),
     "to the whole own one"),
    ("mixed_label", lambda labels, box, grid: (mixed_label(labels, box, grid), labels), "a tuple of 2"),
    ("mixed_label", mixed_by(lambda *box: 6 / 64), "differ"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: losses.mean()), "over all tokens"),
    ("masked_token_loss", lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1)),
     "over all tokens"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: (
        losses.sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()), "over each picture"),
    ("masked_token_loss", lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1).argmax(
        dim=1)), "argmax of zeros"),
    ("masked_token_loss", hard_loss, "only the likeliest class"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: losses.sum()), "that is the sum"),
    ("masked_token_loss", lambda logits, labels: token_loss(
        logits, labels, mean=lambda losses, there: losses.sum() / len(labels)), "divided by the pictures"),
    ("masked_token_loss", lambda logits, labels: token_loss(logits, labels) / labels.shape[2], "over the classes too"),
    ("masked_token_loss", lambda *case: -token_loss(*case), "minus sign"),
    ("masked_token_loss", lambda *case: token_loss(*case, log=lambda logits: logits.softmax(dim=2)), "its logarithm"),
    ("masked_token_loss", lambda *case: token_loss(*case, log=lambda logits: logits.softmax(dim=2).log_softmax(dim=2)),
     "which takes one itself"),
    ("masked_token_loss", lambda *case: token_loss(*case, log=lambda logits: logits.log_softmax(dim=1)),
     "over the tokens; the classes"),
    ("masked_token_loss", kl, "divergence"),
    ("masked_token_loss", lambda *case: token_loss(*case) / 2, "dense_weight comes later"),
    ("masked_token_loss", lambda *case: token_loss(*case, log=lambda logits: logits.softmax(dim=2).log()),
     "with logits of 200"),
    ("masked_token_loss", lambda *case: token_loss(*case, log=lambda logits: (logits.softmax(dim=2) + 1e-12).log()),
     "with logits of 200"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: losses.sum() / (
        losses > 0).sum().clamp(min=1)), "count by their labels, not by their losses"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: losses[there].mean()),
     "without any label it is nan"),
    ("masked_token_loss", lambda *case: token_loss(*case).item(), "nothing can be learnt"),
    ("masked_token_loss", lambda *case: token_loss(*case, mean=lambda losses, there: losses * there),
     "the shape .3, 7., not a number"),
    ("masked_token_loss", lambda *case: (token_loss(*case), 0), "a tuple of 2, not a number"),
    ("masked_token_loss", lambda *case: torch.tensor(2.0), "differ"),
]
