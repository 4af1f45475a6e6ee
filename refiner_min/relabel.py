"""Token labels: label maps pooled under a crop, pictures and labels mixed, MixToken's box, and the loss.

A label map (label_store.LabelMap) says of each of H x W cells of a picture which k classes are likeliest there. Under a
crop it is pooled to one label for the picture and one for every patch token.
    token labeling: "All Tokens Matter", Jiang et al. 2021, arXiv:2104.10858; the maps' crop: ReLabel, arXiv:2101.05022
Shapes: B pictures, K classes, T = grid x grid patch tokens, row by row. It imports no other module of the package.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align


class Labels(NamedTuple):  # what a batch learns from
    image: torch.Tensor  # (B,) int64, or probabilities (B, K)
    tokens: torch.Tensor | None = None  # probabilities (B, T, K), all zero where a token has none; None: the image's


# ----------------------------------------------------------------------------------------------------------------------
# Pooling them under a crop


def pool_label_map(topk_logits, topk_ids, boxes, num_classes: int, size: int):
    """The labels of crops: (B, k, H, W) logits and ids, boxes (B, 4) -> image_labels (B, K), token_labels (B, T, K).

    boxes: x1, y1, x2, y2 as fractions of the picture's width and height, in the order of torchvision's RoIAlign; the
    published code hands it (top, left, bottom, right) and so crops the map mirrored across its diagonal. size: tokens a
    side. aligned=True, because without it a box smaller than a cell is widened to one. Outside of the map is logit 0.
    Source: published, tlt/data/mixup.py; arXiv:2101.05022.
    """
    batch, _, height, width = topk_logits.shape
    dense = topk_logits.new_zeros(batch, num_classes, height, width).scatter_(1, topk_ids, topk_logits)
    x1, y1, x2, y2 = boxes.to(dense.dtype).unbind(1)  # (B,) each
    index = torch.arange(batch, dtype=dense.dtype, device=dense.device)
    rois = torch.stack([index, x1 * width, y1 * height, x2 * width, y2 * height], dim=1)  # (B, 5), in cells
    image = roi_align(dense, rois, 1, aligned=True).flatten(1)  # (B, K)
    tokens = roi_align(dense, rois, size, aligned=True).flatten(2)  # (B, K, T)
    del dense  # (B, K, H, W) is the largest tensor here: it goes before the softmax makes another one
    return image.softmax(dim=1), tokens.softmax(dim=1).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Mixing pictures and labels: a picture's partner is that of the reversed batch


def box_around(grid: int, lam: float, row: int, col: int) -> tuple[int, int, int, int]:
    """CutMix's box on a grid: its side sqrt(1 - lam) of the grid's, floored to an even number, around (row, col),
    clipped at the border. Returns (row0, col0, row1, col1), half open. Source: published; arXiv:1905.04899."""
    half = int(grid * (1 - lam) ** 0.5) // 2
    return max(row - half, 0), max(col - half, 0), min(row + half, grid), min(col + half, grid)


def mix_token_box(grid: int, lam: float, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """box_around a place that is uniform on the grid. On tokens: arXiv:2104.10858."""
    return box_around(grid, lam, *torch.randint(grid, (2,), generator=generator).tolist())


def box_share(box: tuple[int, int, int, int], grid: int) -> float:
    """The share of the grid that lies in the box."""
    row0, col0, row1, col1 = box
    return (row1 - row0) * (col1 - col0) / grid**2


def mixup(images, labels: Labels, lam: float) -> tuple[torch.Tensor, Labels]:
    """lam of each picture and 1 - lam of its partner; all labels, which are probabilities, likewise."""
    images, *mixed = (None if tensor is None else lam * tensor + (1 - lam) * tensor.flip(0)
                      for tensor in (images, *labels))
    return images, Labels(*mixed)


def cutmix(images, labels: Labels, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, Labels]:
    """Paste the box of pixels of its partner into each picture; the image's label is mixed by area, and the tokens
    whose centre the box covers take the partner's labels. (The published code mixes all labels by area.)"""
    row0, col0, row1, col1 = box
    size = images.shape[2]
    images = images.clone()
    images[:, :, row0:row1, col0:col1] = images[:, :, row0:row1, col0:col1].flip(0)
    share, tokens = box_share(box, size), labels.tokens
    if tokens is not None:
        grid = round(tokens.shape[1] ** 0.5)
        centre = (torch.arange(grid, device=tokens.device) + 0.5) * size / grid  # in pixels
        rows, cols = (centre >= row0) & (centre < row1), (centre >= col0) & (centre < col1)  # (grid,)
        pasted = (rows[:, None] & cols).flatten()[:, None]  # (T, 1)
        tokens = torch.where(pasted, tokens.flip(0), tokens)
    return images, Labels((1 - share) * labels.image + share * labels.image.flip(0), tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Learning from them


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the class token, plus dense_weight times the mean of the patch tokens' that have a label.

    Without token labels every token gets the picture's. smoothing s turns a label p into p (1 - s) + s / K, which sums
    to one (the published p (1 - s + s / K) + s / K does not). Source: published, tlt/loss; arXiv:2104.10858.
    Left out: Refiner's cosine term on the blocks' maps. Its similarity runs over the heads instead of the map, and
    half of its pairs are one and the same tensor, so it does not do what it is for.
    """

    def __init__(self, dense_weight: float = 0.5, smoothing: float = 0.0):
        super().__init__()
        self.dense_weight, self.smoothing = dense_weight, smoothing

    def forward(self, output, labels: Labels, share: float = 0.0):
        """output: RefinerOutput, or the class token's logits (B, K) alone. share: of the grid in MixToken's box, by
        which the picture's label is mixed; tokens were swapped back and keep their own."""
        logits, token_logits = output if isinstance(output, tuple) else (output, None)
        loss = self.cross_entropy(logits, labels.image)
        if share:
            loss = (1 - share) * loss + share * self.cross_entropy(logits, labels.image.flip(0))
        loss = loss.mean()
        if token_logits is None:
            return loss
        tokens = labels.tokens
        if tokens is None:
            tokens = labels.image[:, None].expand(token_logits.shape[:2] + labels.image.shape[1:])  # (B, T[, K])
        labelled = torch.ones_like(tokens) if tokens.ndim == 2 else tokens.sum(dim=2) > 0  # (B, T)
        losses = self.cross_entropy(token_logits.flatten(0, 1), tokens.flatten(0, 1)).unflatten(0, labelled.shape)
        return loss + self.dense_weight * (losses * labelled).sum() / labelled.sum().clamp(min=1)

    def cross_entropy(self, logits, labels):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
