"""The sets by name: their folders and downloads, their classes, their two splits opened.

    load_subset(...) -> Subset of two splits (splits.MemorySplit, splits.StreamSplit, scenes.SceneSplit)

A small set is decoded once and kept in memory; ImageNet, and a folder that is too large for that, streams.
It imports listing, pictures, splits, scenes, augment (what a stream does to its pictures), label_store (the maps) and
distributed.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import Imagenette
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2.functional import to_pil_image

from refiner_min import UserError, distributed, locked, some
from refiner_min.augment import StreamAugmentation, evaluation_picture
from refiner_min.label_store import open_labels
from refiner_min.listing import Listing, list_pictures
from refiner_min.pictures import squash
from refiner_min.scenes import SceneSplit
from refiner_min.splits import MemorySplit, PictureMaps, StreamSplit, decode

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = ("digits", "digit-scenes")
SUBSETS = (*BUILT_IN, "imagenette", "imagewoof", "imagenet", "folder")
DOWNLOADS = {  # subset: folder that the archive holds, address, md5
    "imagenette": ("imagenette2-160", *Imagenette._ARCHIVES["160px"]),
    "imagewoof": ("imagewoof2-160", "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-160.tgz",
                  "3d200a7be99704a0d7509be2a9fbfe15"),
}
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded pictures; a larger folder streams
DIGITS = [str(digit) for digit in range(10)]


@dataclass
class Subset:
    name: str
    root: str | None  # its folder; None for what is built in
    train: MemorySplit | StreamSplit | SceneSplit | None  # None where only val/ was opened
    val: MemorySplit | StreamSplit | SceneSplit
    classes: list[str]  # folder names in sorted order: class k is classes[k]
    channels: int = 3
    relabel: str | None = None  # the folder of the training pictures' label maps
    annotator: str | None = None  # who made them

    @property
    def storage(self) -> str:
        return "stream" if isinstance(self.val, StreamSplit) else "memory"

    @property
    def class_names(self) -> list[str]:
        return class_names(self.classes)


def class_names(classes: list[str]) -> list[str]:
    """What a reader calls the classes: ImageNet's by torchvision's names, others by those of their folders."""
    known = dict(zip(imagenet_wnids(), ResNet18_Weights.DEFAULT.meta["categories"]))
    return [known.get(name, name) for name in classes]


def imagenet_wnids() -> list[str]:
    """ImageNet's classes in the order of every classifier of them."""
    return (ASSETS / "imagenet_wnids.txt").read_text().split()


# ----------------------------------------------------------------------------------------------------------------------
# Opening a subset


def stored_size(size: int) -> int:
    """Pixels a side of a decoded picture for images of size: more, so that a crop of a part still has its detail."""
    return round(size * 1.25)


def load_subset(subset: str, data: str | None, size: int, *, only_val: bool = False, storage: str | None = None,
                grid: int = 8, eval_crop: float = 1.0, seed: int = 0, workers: int = 0, skip_bad: bool = False,
                pin_memory: bool = False, transform=None, labels: str | None = None,
                hold_out: float = 0.0) -> Subset:
    """Open a subset by name for images of size x size pixels.

    data: the extracted folder with train/ and val/; None looks in data/ and downloads what can be downloaded.
    only_val: to evaluate; a folder then needs no train/. storage: "memory", where pictures are decoded once and kept,
    or "stream", which ImageNet and what is too large for MEMORY_LIMIT do if it is not said. grid: tokens a side, of
    digit-scenes' token labels. eval_crop: of augment.evaluation_picture. labels: a folder of label maps of the training
    pictures. hold_out: validate on that share of the training pictures (held_out), which are then not trained on.
    For a streamed set: workers, pin_memory, and transform, that of training.
    UserError: what is missing, empty or unreadable.
    """
    if subset in BUILT_IN:
        for flag, value in (("data", data), ("relabel", labels), ("storage", storage)):
            if value is not None:
                hint = ": add --subset folder" if flag == "data" else ""
                raise UserError(f"--{flag} {value} does not go with --subset {subset}, which is built in{hint}")
        splits = _built_in_digits(hold_out)
        return _digits(splits, size, eval_crop) if subset == "digits" else _digit_scenes(splits, size, grid, seed)
    needed = ("train",) if hold_out else ("val",) if only_val else ("train", "val")
    root, folders, classes = open_folders(subset, data, needed)
    if hold_out:
        rest, held = _hold_out(folders["train"], hold_out)
        folders = {"val": held} if only_val else {"train": rest, "val": held}
    store = open_labels(labels, classes) if labels is not None else None
    as_evaluated, stored = partial(evaluation_picture, size=size, crop=eval_crop), stored_size(size)
    count = sum(map(len, folders.values()))
    large = subset == "imagenet" or count * 3 * stored**2 > MEMORY_LIMIT
    if (storage or ("stream" if large else "memory")) == "stream":
        transforms = {"train": transform or StreamAugmentation(size), "val": as_evaluated}
        splits = {name: _stream(folder, transforms[name], seed=seed, workers=workers, skip_bad=skip_bad,
                                pin_memory=pin_memory, store=store if name == "train" else None,
                                keep_workers=name == "train")
                  for name, folder in folders.items()}
    else:
        part = f"-hold-out{hold_out:g}" if hold_out else ""  # in the names of the caches
        val = decode(folders["val"], as_evaluated, size, f"{size}px-crop{eval_crop:g}{part}", skip_bad)
        splits = {"val": replace(val, cropped=True)}
        if not only_val:
            squashed = decode(folders["train"], partial(squash, size=stored), stored, f"{stored}px{part}", skip_bad)
            maps = PictureMaps(store, store.find(squashed.names)) if store is not None else None
            splits["train"] = replace(squashed, maps=maps)
    found = dict(relabel=str(store.folder), annotator=store.annotator) if store is not None else {}
    return Subset(subset, str(root), splits.get("train"), splits["val"], classes, **found)


def _stream(listing: Listing, transform, store, skip_bad: bool, **options) -> StreamSplit:
    maps = None
    if store is not None:
        if skip_bad:  # what the annotator could not read
            listing = listing.only([name not in store.skipped for name in listing.names()])
        maps = PictureMaps(store, store.find(listing.names()))
    return StreamSplit(listing, transform, skip_bad=skip_bad, maps=maps, **options)


def open_folders(subset: str, data: str | None, splits=("train", "val")) -> tuple[Path, dict[str, Listing], list]:
    """The set's folder, its splits by name and its classes. Arguments and UserError: as load_subset's."""
    if data is None and subset not in DOWNLOADS:
        raise UserError(f"--subset {subset} needs --data DIR, the folder that holds train/ and val/")
    root = Path(data) if data is not None else _download(subset)
    folders = {split: _open_folder(root, split) for split in splits}
    return root, folders, _check_folders(root, folders, subset)


def held_out(labels: torch.Tensor, share: float) -> torch.Tensor:
    """Which pictures (n,) to leave out of training: of each class that share, at least one, spread evenly over it.
    UserError: a class has one picture only."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        if len(mine) < 2:
            raise UserError(f"--hold-out {share:g} needs two training pictures of each class: class {label} has one")
        count = max(round(len(mine) * share), 1)
        held[mine[((torch.arange(count) + 0.5) * len(mine) / count).long()]] = True
    return held


def _hold_out(listing: Listing, share: float) -> tuple[Listing, Listing]:
    """The pictures without those that are held out, and those alone."""
    held = held_out(torch.from_numpy(listing.labels), share).numpy()
    return listing.only(~held), listing.only(held)


def _digits(splits, size: int, eval_crop: float) -> Subset:
    """The built-in digits, enlarged once with bicubic interpolation."""
    decoded = []
    for images, labels in splits:
        enlarged = F.interpolate(images, (size, size), mode="bicubic")  # (n, 1, size, size)
        pictures = enlarged.round().clamp(0, 255).to(torch.uint8)
        decoded.append(MemorySplit(pictures, torch.ones(len(labels)), labels))
    train, val = decoded
    shown = torch.stack([evaluation_picture(to_pil_image(picture), size, eval_crop) for picture in val.pictures])
    return Subset("digits", None, train, replace(val, pictures=shown, cropped=True), DIGITS, channels=1)


def _digit_scenes(splits, size: int, grid: int, seed: int) -> Subset:
    """10,000 scenes an epoch to train on, new ones in each; 1,000 to validate, always the same, of other digits."""
    train, val = splits
    return Subset("digit-scenes", None, SceneSplit(*train, 10_000, size, grid, seed),
                  SceneSplit(*val, 1_000, size, grid, seed=0, stream="validation scenes"), DIGITS, channels=1)


def _built_in_digits(hold_out: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 1, 8, 8) from 0 to 255 and labels (n,) to train on, and to validate; the latter every fifth of a
    class, or what is held out of the others."""
    with np.load(ASSETS / "digits.npz") as asset:
        images, labels = torch.from_numpy(asset["images"]), torch.from_numpy(asset["labels"]).long()
    rank_in_class = torch.empty_like(labels)
    for digit in labels.unique():
        rank_in_class[labels == digit] = torch.arange(int((labels == digit).sum()))
    images, validated = images[:, None] * (255 / 16), rank_in_class % 5 == 4
    if hold_out:
        images, labels = images[~validated], labels[~validated]
        validated = held_out(labels, hold_out)
    return [(images[chosen], labels[chosen]) for chosen in (~validated, validated)]


def _download(subset: str, root: Path = Path("data")) -> Path:
    """The subset's folder below data/, downloaded if it is not there, by one process for all."""
    name, url, md5 = DOWNLOADS[subset]
    target = root / name
    with distributed.first_alone():
        if target.exists():
            return target
        try:
            root.mkdir(exist_ok=True)
            with locked(root / f"{name}.lock"):
                if not target.exists():
                    _fetch(subset, target, url, md5)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):  # it stays if there is something in it
                root.rmdir()
            raise UserError(f"no {subset} in {target}, and none could be downloaded from {url} ({error}); "
                            f"--data DIR takes an extracted folder, and --subset digits works now") from None
    return target


def _fetch(subset: str, target: Path, url: str, md5: str):
    """Download and extract aside, then rename, so that a folder found later is a whole one."""
    staging = target.with_name(f"{target.name}.download")
    shutil.rmtree(staging / target.name, ignore_errors=True)  # what an interrupted extraction left
    try:
        if subset == "imagenette":
            staging.mkdir(parents=True, exist_ok=True)
            Imagenette(staging, size="160px", download=True)
        else:
            download_and_extract_archive(url, staging, md5=md5)
        os.replace(staging / target.name, target)
        shutil.rmtree(staging)
    finally:
        with suppress(OSError):
            staging.rmdir()


def _open_folder(root: Path, split: str) -> Listing:
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}/: --data takes a folder that holds train/ and val/, "
                        f"each with one folder of pictures a class")
    return list_pictures(root / split)


def _check_folders(root: Path, folders: dict[str, Listing], subset: str) -> list[str]:
    """The classes, if the splits agree on them and no class is empty."""
    sets = [set(folder.classes) for folder in folders.values()]
    only = sorted(set.union(*sets) - set.intersection(*sets))
    if only:
        raise UserError(f"{root}/train and {root}/val must hold the same classes; only one of them has {some(only)}")
    for split, folder in folders.items():
        empty = sorted(set(range(len(folder.classes))) - set(folder.labels.tolist()))
        if empty:
            raise UserError(f"no pictures in {root / split} for {some([folder.classes[index] for index in empty])}")
    split, folder = next(iter(folders.items()))
    if len(folder.classes) < 2:
        raise UserError(f"{root}/{split} has one class, {folder.classes[0]}: there is nothing to tell apart")
    if subset == "imagenet" and folder.classes != imagenet_wnids():
        raise UserError(f"{root} does not hold ImageNet's 1000 classes (it has {len(folder.classes)}, "
                        f"{folder.classes[0]} first): --subset folder takes any classes")
    return folder.classes
