"""Token labels: the stores they are read from, pooling under a crop, mixing, MixToken's box and the loss.

A label map is what an annotator network says of every place of a picture: for each of H x W cells its k largest class
logits and their classes. Under a crop it is pooled to one label for the picture and one for every patch token.
    token labeling: "All Tokens Matter", Jiang et al. 2021, arXiv:2104.10858; the maps' crop: ReLabel, arXiv:2101.05022
Shapes: B pictures, K classes, T = grid x grid patch tokens, row by row. It imports no other module of the package.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from refiner_min import UserError


class LabelMap(NamedTuple):
    logits: torch.Tensor  # (B, k, H, W) float32, largest first; a class that is not among them counts as logit 0
    ids: torch.Tensor  # (B, k, H, W) int64


class Labels(NamedTuple):  # what a batch learns from
    image: torch.Tensor  # (B,) int64, or probabilities (B, K)
    tokens: torch.Tensor | None = None  # probabilities (B, T, K), all zero where a token has none; None: the image's


# ----------------------------------------------------------------------------------------------------------------------
# Reading label maps


def open_labels(folder, classes: list[str]):
    """The label maps in a folder: a packed store of ours, or files in the published layout.

    Both have find(names) -> keys and read(keys) -> LabelMap; a name is "CLASS/STEM", the picture's path without its
    suffix. UserError: there are none, they are incomplete, or they were made for other classes.
    """
    folder = Path(folder)
    if (folder / PackedLabels.FACTS).exists():
        return PackedLabels(folder, classes)
    if next(folder.glob("*/*.pt"), None):
        return LabelFiles(folder, len(classes))
    raise UserError(f"--relabel {folder} holds no label maps: neither {PackedLabels.FACTS}, which python -m "
                    f"refiner_min.annotate writes, nor CLASS/STEM.pt as in the published layout")


class PackedLabels:
    """One store for a whole set: labels.json (annotator, size, classes, shape, rows done), pictures.txt (the name of
    row i in line i), logits.f16 and ids.i16 (n, k, H, W), which stay on the disk and are mapped into memory."""

    FACTS, NAMES, LOGITS, IDS = "labels.json", "pictures.txt", "logits.f16", "ids.i16"

    def __init__(self, folder: Path, classes: list[str]):
        facts, names = self.describe(folder)
        if facts["classes"] != classes:
            other = sorted(set(facts["classes"]) ^ set(classes)) or ["another order"]
            raise UserError(f"{folder} was made for other classes ({len(facts['classes'])}; the set has "
                            f"{len(classes)}; different: {', '.join(other[:3])})")
        if facts["done"] < len(names):
            raise UserError(f"{folder} is not complete ({facts['done']} of {len(names)} pictures): the command that "
                            f"began it goes on with --resume")
        self.folder, self.num_classes, self.shape = folder, len(classes), (len(names), *facts["shape"])
        self.annotator, self.skipped = f"{facts['annotator']} at {facts['size']} px", set(facts["skipped"])
        self.check_size(folder, facts)

    @classmethod
    def describe(cls, folder: Path) -> tuple[dict, list[str]]:
        """What labels.json says, and the pictures' names. UserError: they are damaged."""
        try:
            facts = json.loads((folder / cls.FACTS).read_text())
            if not {"annotator", "size", "classes", "shape", "done", "skipped"} <= facts.keys():
                raise ValueError(f"{cls.FACTS} holds {', '.join(facts) or 'nothing'}")
            if not all(isinstance(number, int) for number in (facts["done"], *facts["shape"])):
                raise ValueError(f"{cls.FACTS} holds the shape {facts['shape']}")
            return facts, cls.unpack((folder / cls.NAMES).read_bytes())
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} is a damaged store of label maps ({error}): make it again") from None

    @classmethod
    def check_size(cls, folder: Path, facts: dict):
        """UserError if the files hold fewer rows than labels.json says."""
        expected = 2 * facts["done"] * math.prod(facts["shape"])  # bytes
        for path in (folder / cls.LOGITS, folder / cls.IDS):
            if not path.exists() or path.stat().st_size < expected:
                raise UserError(f"{folder} is a damaged store of label maps ({path.name} is shorter than the "
                                f"{expected:,} bytes that {cls.FACTS} speaks of): make it again")

    @staticmethod
    def pack(names: list[str]) -> bytes:
        return "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")

    @staticmethod
    def unpack(names: bytes) -> list[str]:
        return names.decode("utf-8", "surrogateescape").split("\n")[:-1]

    def find(self, names: list[str]) -> np.ndarray:
        """The rows of the pictures. UserError: how many have none."""
        _, lines = self.describe(self.folder)
        rows = {name: row for row, name in enumerate(lines) if name not in self.skipped}
        _check_found(self.folder, names, [name in rows for name in names])
        return np.array([rows[name] for name in names])

    def planes(self) -> tuple[np.memmap, np.memmap]:
        """Mapped anew for every read: nothing to send to a worker process, and no page stays in memory."""
        return (np.memmap(self.folder / self.LOGITS, "<f2", "r", shape=self.shape),
                np.memmap(self.folder / self.IDS, "<i2", "r", shape=self.shape))

    def read(self, rows) -> LabelMap:
        logits, ids = (torch.from_numpy(plane[rows]) for plane in self.planes())
        return _checked(LabelMap(logits.float(), ids.long()), self.num_classes,
                        [f"row {row} of {self.folder}" for row in rows])


class LabelFiles:
    """The published layout: FOLDER/CLASS/STEM.pt, a tensor (2, k, H, W) of logits and ids; STEM ends at the first dot
    of the picture's name. NFNet-F6's maps are 18 x 18, ReLabel's 15 x 15. Source: published, tlt/data/dataset.py."""

    def __init__(self, folder: Path, num_classes: int):
        self.folder, self.num_classes, self.annotator, self.skipped = folder, num_classes, "published files", set()

    def find(self, names: list[str]) -> np.ndarray:
        """The files of the pictures, below the folder. UserError: how many have none."""
        there = {f"{path.parent.name}/{path.stem}" for path in self.folder.glob("*/*.pt")}
        stems = [f"{Path(name).parts[0]}/{Path(name).name.split('.')[0]}" for name in names]
        _check_found(self.folder, names, [stem in there for stem in stems])
        self.shape = self._load(self.folder / f"{stems[0]}.pt").shape  # that of all
        self.read(stems[:1])  # so that maps of other classes are told before training starts
        return np.array(stems)

    def read(self, stems) -> LabelMap:
        paths = [self.folder / f"{stem}.pt" for stem in stems]
        maps = [self._load(path) for path in paths]  # (2, k, H, W) each
        for path, planes in zip(paths, maps):
            if planes.shape != self.shape:
                raise UserError(f"{path} is no label map (shape {tuple(planes.shape)} instead of {tuple(self.shape)})")
        logits, ids = torch.stack(maps, dim=1)
        return _checked(LabelMap(logits.float(), ids.long()), self.num_classes, paths)

    def _load(self, path: Path) -> torch.Tensor:
        try:
            planes = torch.load(path, map_location="cpu", weights_only=True)
            if planes.ndim != 4 or len(planes) != 2:
                raise ValueError(f"shape {tuple(planes.shape)} instead of (2, k, H, W)")
        except Exception as error:  # torch.load raises many kinds
            raise UserError(f"{path} is no label map ({(str(error) or repr(error)).splitlines()[0]})") from None
        return planes


def _check_found(folder: Path, names: list[str], found: list[bool]):
    if not all(found):
        raise UserError(f"{folder} has no map for {found.count(False)} of the {len(names)} training pictures, "
                        f"{names[found.index(False)]} the first of them: was it made for this set?")


def _checked(maps: LabelMap, num_classes: int, sources: list) -> LabelMap:
    outside = (maps.ids < 0) | (maps.ids >= num_classes)  # (B, k, H, W)
    if outside.any():
        index = int(outside.nonzero()[0, 0])
        raise UserError(f"{sources[index]} holds the class id {int(maps.ids[outside][0])}, but the set has "
                        f"{num_classes} classes")
    if not maps.logits.isfinite().all():
        index = int(maps.logits.isfinite().logical_not().nonzero()[0, 0])
        raise UserError(f"{sources[index]} holds logits that are not finite")
    return maps


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


def mix_token_box(grid: int, lam: float, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """CutMix's box on a grid: its side sqrt(1 - lam) of the grid's, its centre uniform, clipped at the border.
    Returns (row0, col0, row1, col1), half open. Source: arXiv:1905.04899; on tokens: arXiv:2104.10858."""
    side = round(grid * (1 - lam) ** 0.5)
    row, col = (torch.randint(grid, (2,), generator=generator) - side // 2).tolist()
    return max(row, 0), max(col, 0), min(row + side, grid), min(col + side, grid)


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
    Left out: the published cosine term on the blocks' maps. Its similarity runs over the heads instead of the map, and
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
