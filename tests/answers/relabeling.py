import torch
import torch.nn.functional as F


def mixed_label(labels, box, grid, share=None):
    row0, col0, row1, col1 = box
    share = (row1 - row0) * (col1 - col0) / grid**2 if share is None else share
    return (1 - share) * labels + share * labels.flip(0)


def mirror_overlap(box, clamp=True, union=True):
    x1, y1, x2, y2 = box.tolist()
    side = min(x2, y2) - max(x1, y1)
    met = max(side, 0) ** 2 if clamp else side**2
    return met / (2 * (x2 - x1) * (y2 - y1) - (met if union else 0))


def spread_out(logits, ids, count):
    return torch.zeros(logits.shape[0], count, *logits.shape[2:]).scatter(1, ids, logits)


RIGHT = {
    "spread_out": [spread_out],
    "compose": [lambda outer, inner: outer[:2].repeat(2) + inner * (outer[2:] - outer[:2]).repeat(2)],
    "mirror_overlap": [mirror_overlap],
    "mixed_label": [mixed_label, lambda labels, box, grid: labels.copy_(mixed_label(labels, box, grid))],
}
WRONG = [
    ("spread_out", lambda logits, ids, count: spread_out(logits, ids, count).softmax(dim=1), "a softmax already"),
    ("spread_out", lambda logits, ids, count: F.pad(logits, (0, 0, 0, 0, 0, 3)), "in the order of their rank"),
    ("compose", lambda outer, inner: inner * (outer[2:] - outer[:2]).repeat(2), "scaled but not moved"),
    ("compose", lambda outer, inner: outer * inner, "multiplied"),
    ("mirror_overlap", lambda box: mirror_overlap(box, clamp=False), "do not meet"),
    ("mirror_overlap", lambda box: mirror_overlap(box, union=False), "is no union"),
    ("mixed_label", lambda labels, box, grid: mixed_label(labels, box, grid, 1 - 6 / 16), "own and partner"),
    ("mixed_label", lambda labels, box, grid: labels, "are not mixed"),
]
