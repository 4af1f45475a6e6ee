"""Small folders of generated pictures, in the layout of the large sets."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n02102040", "n02979186")


def make_folder(root: Path, train: int = 6, val: int = 3, size: tuple[int, int] = (40, 30), classes=CLASSES) -> Path:
    """root/train/CLASS/i.png and root/val/CLASS/i.png: noise, brighter from class to class, so that it can be learned.
    size: width, height."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = random.integers(0, 60, (size[1], size[0], 3)) + 190 * index // max(len(classes) - 1, 1)
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def pack_labels(folder: Path, names: list[str], logits, ids, classes=CLASSES, **facts) -> Path:
    """A packed store of label maps, written byte by byte: logits and ids (n, k, H, W)."""
    folder.mkdir(parents=True)
    (folder / "pictures.txt").write_text("\n".join(names) + "\n")
    (folder / "logits.f16").write_bytes(np.asarray(logits).astype("<f2").tobytes())
    (folder / "ids.i16").write_bytes(np.asarray(ids).astype("<i2").tobytes())
    known = dict(annotator="hand", size=64, classes=list(classes), shape=list(logits.shape[1:]),
                 done=len(names), skipped=[])
    (folder / "labels.json").write_text(json.dumps(known | facts))
    return folder


def random_labels(count: int, num_classes: int = 3, grid: int = 4, top: int = 2, seed: int = 0):
    """Logits and ids (count, top, grid, grid) of random maps, as a store holds them."""
    random = np.random.default_rng(seed)
    ids = random.permuted(np.broadcast_to(np.arange(num_classes), (count, grid, grid, num_classes)), axis=3)
    logits = -np.sort(-random.normal(0, 3, (count, top, grid, grid)).astype(np.float16), axis=1)
    return logits, np.moveaxis(ids[..., :top], 3, 1)


def names_of(root: Path, split: str = "train") -> list[str]:
    return sorted(path.relative_to(root / split).with_suffix("").as_posix() for path in (root / split).rglob("*.png"))
