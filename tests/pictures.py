"""Small folders of generated pictures, in the layout of the large sets."""

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
