"""The data sets and their augmentation, from the built-in digits to ImageNet.

A small set is decoded once to squares of uint8, cached beside its pictures, kept on the training device and augmented
there, a whole batch at a time but every picture in its own way. ImageNet streams through DataLoader workers.

    load_subset(...) -> Subset of two splits
    split.epoch(...) -> batches of pictures as uint8; Augmentation or center_crop makes them images

It imports relabel, for the label maps that go with the pictures and are augmented with them.
"""

import hashlib
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from tqdm import tqdm

from refiner_min import UserError, relabel, replacing
from refiner_min.relabel import LabelMap

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = ("digits", "digit-scenes")
SUBSETS = (*BUILT_IN, "imagenette", "imagewoof", "imagenet", "folder")
DOWNLOADS = {  # subset: folder that the archive holds, address, md5
    "imagenette": ("imagenette2-160", *Imagenette._ARCHIVES["160px"]),
    "imagewoof": ("imagewoof2-160", "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-160.tgz",
                  "3d200a7be99704a0d7509be2a9fbfe15"),
}
CACHE_FORMAT = 2
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded pictures; a larger folder streams
DIGITS = [str(digit) for digit in range(10)]
SKIP_HINT = "--skip-bad leaves such pictures out"
CLASS_NAMES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle", "n02089973": "English foxhound",
    "n02093754": "Border terrier", "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # of Imagenette and Imagewoof; other classes go by the name of their folder


# ----------------------------------------------------------------------------------------------------------------------
# What a split is


class Batch(NamedTuple):
    pictures: torch.Tensor  # (B, channels, S, S) uint8; once augmented, images
    aspects: torch.Tensor  # (B,) float32, width over height before the squashing
    labels: torch.Tensor  # (B,) int64
    label_map: LabelMap | None = None  # of the whole pictures, on which it was changed as they were
    boxes: torch.Tensor | None = None  # (B, 4), where a picture that is cropped already was cut out of its map
    token_labels: torch.Tensor | None = None  # (B, T, K), where they are known exactly

    def to(self, device) -> "Batch":
        def move(value):
            if value is None:
                return None
            return LabelMap(*map(move, value)) if isinstance(value, LabelMap) else value.to(device, non_blocking=True)

        return Batch(*map(move, self))


@dataclass
class MemorySplit:
    """A decoded split: every picture squashed to a square, so that a crop is a box of fractions of its sides."""

    pictures: torch.Tensor  # (n, channels, S, S) uint8
    aspects: torch.Tensor  # (n,) float32
    labels: torch.Tensor  # (n,) int64
    names: list[str] = field(default_factory=list)  # CLASS/STEM of each; a built-in set has none
    maps: tuple | None = None  # the label maps and each picture's key in them; they are read batch by batch
    cropped = False  # the pictures of a batch are whole
    note = ""  # what a run says of such a set

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return replace(self, **{name: getattr(self, name).to(device) for name in ("pictures", "aspects", "labels")})

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices; nothing in them depends on the epoch."""
        on_device = indices.to(self.labels.device)
        for batch, here in zip(on_device.split(batch_size), indices.split(batch_size)):
            label_map = None
            if self.maps is not None:
                labels, keys = self.maps
                planes = labels.read(keys[here.numpy()])
                pinned = (plane.pin_memory() if self.labels.is_cuda else plane for plane in planes)
                label_map = LabelMap(*(plane.to(self.labels.device, non_blocking=True) for plane in pinned))
            yield Batch(self.pictures[batch], self.aspects[batch], self.labels[batch], label_map)


class StreamSplit:
    """A split that is read from disk as it is needed, by worker processes that live as long as it does.

    transform: PIL picture -> (3, size, size) uint8; with maps, picture and its LabelMap -> those two and the crop's
    box. What is random in it depends on seed, epoch and picture only, never on the workers. maps: as MemorySplit's.
    A picture that cannot be read is a UserError naming it, or with skip_bad left out and counted.
    """

    cropped = True  # by the transform: the pictures of a batch are as large as the images
    note = ", streamed (--turn and --colour are for decoded sets)"

    def __init__(self, folder: ImageFolder, transform, seed: int = 0, workers: int = 0, skip_bad: bool = False,
                 maps: tuple | None = None):
        self.folder, self.transform, self.seed, self.workers = folder, transform, seed, workers
        self.skip_bad, self.bad = skip_bad, set()
        self.device = torch.device("cpu")
        self.batches = []  # of (index, seed), filled anew for every epoch
        self.loader = DataLoader(
            _Samples(folder.samples, transform, maps), batch_sampler=self.batches, num_workers=workers,
            collate_fn=_collate, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
            worker_init_fn=ignore_signals, generator=torch.Generator())  # its own: training's is not drawn from

    def __len__(self):
        return len(self.folder.samples)

    def to(self, device):
        self.device = torch.device(device)
        return self

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices."""
        seeded = [(index, hash((self.seed, epoch, index))) for index in indices.tolist()]
        self.batches[:] = [seeded[start:start + batch_size] for start in range(0, len(seeded), batch_size)]
        for batch, bad in self.loader:
            for message in bad:
                self._leave_out(message)
            if batch is None:
                raise UserError(f"no picture of a whole batch could be read; the last one: {bad[-1]}")
            yield batch.to(self.device)

    def _leave_out(self, message: str):
        if isinstance(message, _BadMap):
            raise UserError(message)
        if not self.skip_bad:
            raise UserError(f"{message}; {SKIP_HINT}")
        if message not in self.bad:
            self.bad.add(message)
            tqdm.write(f"left out, {len(self.bad)} so far: {message}")


class _Samples(Dataset):
    def __init__(self, samples, transform, maps=None):
        self.samples, self.transform, self.maps = samples, transform, maps

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        path, label = self.samples[index]
        try:
            picture = read_picture(path)
        except UserError as error:
            return str(error)
        try:
            label_map = None if self.maps is None else self.maps[0].read(self.maps[1][[index]])
        except UserError as error:
            return _BadMap(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if label_map is None:
                return self.transform(picture), torch.tensor(1.0), torch.tensor(label)
            picture, label_map, box = self.transform(picture, LabelMap(*(plane[0] for plane in label_map)))
            return picture, torch.tensor(1.0), torch.tensor(label), label_map, box


class _BadMap(str):
    """What is wrong with a label map. Unlike a picture that is bad, it is not left out."""


def _collate(samples) -> tuple[Batch | None, list[str]]:
    good = [sample for sample in samples if not isinstance(sample, str)]
    batch = Batch(*default_collate(good)) if good else None
    return batch, [sample for sample in samples if isinstance(sample, str)]


def ignore_signals(worker: int):
    """Ctrl-C and a scheduler's SIGTERM reach the workers too; whether to stop is for the main process to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Subset:
    name: str
    root: str | None  # its folder; None for what is built in
    train: "MemorySplit | StreamSplit | SceneSplit"
    val: "MemorySplit | StreamSplit | SceneSplit"
    classes: list[str]  # folder names in sorted order: class k is classes[k]
    channels: int = 3
    relabel: str | None = None  # the folder of the training pictures' label maps
    annotator: str | None = None  # who made them

    @property
    def class_names(self) -> list[str]:
        return class_names(self.classes)


def class_names(classes: list[str]) -> list[str]:
    """What a reader calls the classes."""
    return [CLASS_NAMES.get(name, name) for name in classes]


def imagenet_wnids() -> list[str]:
    """ImageNet's classes in the order of every classifier of them."""
    return (ASSETS / "imagenet_wnids.txt").read_text().split()


# ----------------------------------------------------------------------------------------------------------------------
# Opening a subset


def load_subset(subset: str, data: str | None, size: int, *, grid: int = 8, eval_crop: float = 1.0, seed: int = 0,
                workers: int = 0, skip_bad: bool = False, transform=None, labels: str | None = None) -> Subset:
    """Open a subset by name for images of size x size pixels.

    data: the extracted folder with train/ and val/; None looks in data/ and downloads what can be downloaded.
    grid: tokens a side, of digit-scenes' token labels. labels: a folder of label maps of the training pictures.
    For a streamed set: eval_crop, the share of the shorter side that evaluation keeps; transform, that of training.
    UserError: what is missing, empty or unreadable.
    """
    if subset in BUILT_IN:
        if data is not None:
            raise UserError(f"--data {data} does not go with --subset {subset}, which is built in: add --subset folder")
        if labels is not None:
            raise UserError(f"--relabel {labels} does not go with --subset {subset}, which is built in")
        return _digits(size) if subset == "digits" else _digit_scenes(size, grid, seed)
    root, folders, classes = open_folders(subset, data)
    labels = relabel.open_labels(labels, classes) if labels is not None else None
    stored = stored_size(size)
    count = sum(len(folder.samples) for folder in folders.values())
    if subset == "imagenet" or count * 3 * stored**2 > MEMORY_LIMIT:
        resize = v2.Resize(math.floor(size / eval_crop), v2.InterpolationMode.BICUBIC)
        whole = v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])
        options = dict(seed=seed, workers=workers, skip_bad=skip_bad)
        if labels is not None and skip_bad:  # what the annotator could not read
            samples = zip(folders["train"].samples, picture_names(folders["train"]))
            folders["train"].samples = [sample for sample, name in samples if name not in labels.skipped]
        maps = (labels, labels.find(picture_names(folders["train"]))) if labels is not None else None
        splits = [StreamSplit(folders["train"], transform or StreamAugmentation(size), maps=maps, **options),
                  StreamSplit(folders["val"], whole, **options)]
    else:
        splits = _decode(root, folders, stored, skip_bad)
        if labels is not None:
            splits[0].maps = labels, labels.find(splits[0].names)
    found = dict(relabel=str(labels.folder), annotator=labels.annotator) if labels is not None else {}
    return Subset(subset, str(root), *splits, classes, **found)


def open_folders(subset: str, data: str | None) -> tuple[Path, dict[str, ImageFolder], list[str]]:
    """The set's folder, its splits "train" and "val" and its classes. Arguments and UserError: as load_subset's."""
    if data is None and subset not in DOWNLOADS:
        raise UserError(f"--subset {subset} needs --data DIR, the folder that holds train/ and val/")
    root = Path(data) if data is not None else _download(subset)
    folders = {split: _open_folder(root, split) for split in ("train", "val")}
    return root, folders, _check_folders(root, folders, subset)


def picture_names(folder: ImageFolder) -> list[str]:
    """CLASS/STEM of every picture: its path below the split without the suffix."""
    return [Path(path).relative_to(folder.root).with_suffix("").as_posix() for path, _ in folder.samples]


def _digits(size: int) -> Subset:
    """The built-in digits, enlarged once with bicubic interpolation."""
    splits = []
    for images, labels in _built_in_digits():
        enlarged = F.interpolate(images, (size, size), mode="bicubic")  # (n, 1, size, size)
        pictures = enlarged.round().clamp(0, 255).to(torch.uint8)
        splits.append(MemorySplit(pictures, torch.ones(len(labels)), labels))
    return Subset("digits", None, *splits, DIGITS, channels=1)


def _built_in_digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 1, 8, 8) from 0 to 255 and labels (n,) to train on, and to validate; the latter every fifth of a
    class."""
    with np.load(ASSETS / "digits.npz") as asset:
        images, labels = torch.from_numpy(asset["images"]), torch.from_numpy(asset["labels"]).long()
    rank_in_class = torch.empty_like(labels)
    for digit in labels.unique():
        rank_in_class[labels == digit] = torch.arange(int((labels == digit).sum()))
    return [(images[chosen][:, None] * (255 / 16), labels[chosen])
            for chosen in (rank_in_class % 5 != 4, rank_in_class % 5 == 4)]


def _download(subset: str, root: Path = Path("data")) -> Path:
    """The subset's folder below data/, downloaded if it is not there."""
    name, url, md5 = DOWNLOADS[subset]
    target, staging = root / name, root / f"{name}.download"
    if target.exists():
        return target
    try:  # extracted aside and renamed, so that a folder found later is a whole one
        shutil.rmtree(staging / name, ignore_errors=True)  # what an interrupted extraction left
        if subset == "imagenette":
            staging.mkdir(parents=True, exist_ok=True)
            Imagenette(staging, size="160px", download=True)
        else:
            download_and_extract_archive(url, staging, md5=md5)
        os.replace(staging / name, target)
        shutil.rmtree(staging)
    except (OSError, RuntimeError) as error:
        for folder in (staging, root):
            with suppress(OSError):  # it stays if there is something in it
                folder.rmdir()
        raise UserError(f"no {subset} in {target}, and none could be downloaded from {url} ({error}); "
                        f"--data DIR takes an extracted folder, and --subset digits works now") from None
    return target


def _open_folder(root: Path, split: str) -> ImageFolder:
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}/: --data takes a folder that holds train/ and val/, "
                        f"each with one folder of pictures a class")
    try:
        return ImageFolder(root / split, allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{root / split} has no folders in it: one folder of pictures a class is expected") from None


def _check_folders(root: Path, folders: dict[str, ImageFolder], subset: str) -> list[str]:
    """The classes, if train/ and val/ agree on them and no class is empty."""
    train, val = folders["train"], folders["val"]
    only = sorted(set(train.classes) ^ set(val.classes))
    if only:
        raise UserError(f"{root}/train and {root}/val must hold the same classes; only one of them has {_some(only)}")
    for split, folder in folders.items():
        empty = sorted(set(range(len(folder.classes))) - set(folder.targets))
        if empty:
            raise UserError(f"no pictures in {root / split} for {_some([folder.classes[index] for index in empty])}")
    if len(train.classes) < 2:
        raise UserError(f"{root}/train has one class, {train.classes[0]}: there is nothing to tell apart")
    if subset == "imagenet" and train.classes != imagenet_wnids():
        raise UserError(f"{root} does not hold ImageNet's 1000 classes (it has {len(train.classes)}, "
                        f"{train.classes[0]} first): --subset folder takes any classes")
    return train.classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Scenes of digits, whose token labels are known


def _digit_scenes(size: int, grid: int, seed: int) -> Subset:
    """10,000 scenes an epoch to train on, new ones in each; 1,000 to validate, always the same, of other digits."""
    train, val = _built_in_digits()
    return Subset("digit-scenes", None, SceneSplit(*train, 10_000, size, grid, seed),
                  SceneSplit(*val, 1_000, size, grid, seed=-1), DIGITS, channels=1)


class SceneSplit:
    """Pictures of up to four digits of different sizes that don't overlap, drawn where they are trained on.

    The picture's class is that of its largest digit. A token's is that of the digit whose square covers the token's
    centre; where there is none its label is all zero. Scene i of an epoch depends on (seed, epoch, i) only. Ours.
    """

    DIGITS, TRIES = 4, 16  # a digit that finds no room in so many tries is left out
    LARGEST, OTHERS = (0.4, 0.5), (0.5, 0.8)  # side of the largest digit over the scene's; of the others over that one
    cropped = True
    note = ", new ones in every epoch (--crop-*, --flip, --turn and --colour are for photographs)"

    def __init__(self, images, labels, count: int, size: int, grid: int, seed: int):
        self.images, self.labels = images, labels  # (n, 1, 8, 8) from 0 to 255, (n,)
        self.count, self.size, self.grid, self.seed = count, size, grid, seed

    def __len__(self):
        return self.count

    def to(self, device):
        return SceneSplit(self.images.to(device), self.labels.to(device), self.count, self.size, self.grid, self.seed)

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        chance = torch.rand(self.count, self.DIGITS, 2 + 2 * self.TRIES, generator=generator).to(self.labels.device)
        for batch in indices.to(chance.device).split(batch_size):
            yield self.draw(chance[batch])

    def draw(self, chance) -> Batch:
        """Scenes from numbers (B, digits, 2 + 2 tries) between 0 and 1."""
        which = (chance[:, :, 0] * len(self.labels)).long()  # (B, digits), the largest one first
        largest, others = (low + (high - low) * chance[:, :, 1] for low, high in (self.LARGEST, self.OTHERS))
        sides = torch.cat([largest[:, :1], largest[:, :1] * others[:, 1:]], dim=1)  # of the scene's
        boxes = self.place(sides, chance[:, :, 2:].unflatten(2, (self.TRIES, 2)))  # (B, digits, 4)
        centre = (torch.arange(self.grid, device=chance.device) + 0.5) / self.grid  # (grid,)
        x, y = centre.repeat(self.grid), centre.repeat_interleave(self.grid)  # (T,), row by row
        x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, digits, 1) each
        covers = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)  # (B, digits, T)
        classes = F.one_hot(self.labels[which], 10).float()  # (B, digits, K)
        return Batch(self.paint(self.images[which], boxes, sides), torch.ones_like(sides[:, 0]),
                     self.labels[which[:, 0]], token_labels=covers.float().transpose(1, 2) @ classes)

    def place(self, sides, tries):
        """The first of the tries (B, digits, tries, 2) in which a digit overlaps with none before it, as a box; a digit
        without one lies outside of the scene."""
        boxes = torch.full((*sides.shape, 4), 2.0, device=sides.device)  # (B, digits, 4)
        for index in range(self.DIGITS):
            side = sides[:, index, None, None]  # (B, 1, 1)
            corners = tries[:, index] * (1 - side)  # (B, tries, 2)
            before = boxes[:, None, :index]  # (B, 1, index, 4)
            low, high = corners[:, :, None], corners[:, :, None] + side[:, :, None]  # (B, tries, 1, 2)
            apart = (low >= before[..., 2:]) | (high <= before[..., :2])
            free = apart.any(dim=3).all(dim=2)  # (B, tries)
            first = free.int().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
            corner = torch.where(free.any(dim=1)[:, None], corners.gather(1, first)[:, 0], 2.0)  # (B, 2)
            boxes[:, index] = torch.cat([corner, corner + side[:, 0]], dim=1)
        return boxes

    def paint(self, images, boxes, sides):
        """Digits (B, digits, 1, 8, 8) into their boxes: pictures (B, 1, size, size) uint8."""
        centre = (boxes[..., :2] + boxes[..., 2:] - 1) / sides[..., None]  # (B, digits, 2), in digits
        theta = torch.cat([(1 / sides)[..., None, None] * torch.eye(2, device=sides.device), -centre[..., None]], dim=3)
        grid = F.affine_grid(theta.flatten(0, 1), (theta[..., 0, 0].numel(), 1, self.size, self.size),
                             align_corners=False)  # where in its digit each pixel of a scene lies
        painted = F.grid_sample(images.flatten(0, 1), grid, align_corners=False)
        return painted.unflatten(0, sides.shape).sum(dim=1).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Reading pictures


def read_picture(source, mode: str = "RGB") -> Image.Image:
    """A picture as mode, "RGB" or "L", upright. source: a path. UserError if it cannot be read."""
    try:
        with Image.open(source) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{source} is not a picture that can be read ({error})") from None


def stored_size(size: int) -> int:
    """Pixels a side of a decoded picture for images of size: more, so that a crop of a part still has its detail."""
    return round(size * 1.25)


def squash(picture: Image.Image, size: int) -> torch.Tensor:
    """The whole picture as a square: (channels, size, size) uint8."""
    return v2.functional.pil_to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))


def _decode(root: Path, folders: dict[str, ImageFolder], size: int, skip_bad: bool) -> list[MemorySplit]:
    """Both splits as squares of size pixels, from the cache beside the pictures if it still fits them."""
    samples = [(Path(path), label) for folder in folders.values() for path, label in folder.samples]
    listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path, _ in samples)
    key = hashlib.sha256(f"{CACHE_FORMAT} {size} {skip_bad}\n{listing}".encode()).hexdigest()
    cache = root / f"refiner_min-{size}px.pt"
    try:
        stored = torch.load(cache, weights_only=True)
        if stored["key"] == key:
            return [MemorySplit(*fields) for fields in stored["splits"]]
    except Exception:  # no cache, or a damaged one: it is made again
        pass
    splits = [_decode_split(folder, split, size, skip_bad) for split, folder in folders.items()]
    try:
        with replacing(cache) as file:
            torch.save({"key": key, "splits": [(s.pictures, s.aspects, s.labels, s.names) for s in splits]}, file)
    except UserError as error:
        print(f"not cached, so the pictures will be decoded again next time: {error}")
    return splits


def _decode_split(folder: ImageFolder, split: str, size: int, skip_bad: bool) -> MemorySplit:
    def decode(path):
        try:
            picture = read_picture(path)
        except UserError as error:
            return str(error)
        return squash(picture, size), picture.width / picture.height

    paths = [path for path, _ in folder.samples]
    pictures = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    aspects, bad = torch.empty(len(paths)), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(decode, paths), f"decoding {split}", len(paths), unit=" pictures", disable=None)
        for index, result in enumerate(results):
            if not isinstance(result, str):
                pictures[index], aspects[index] = result
            elif skip_bad:
                bad[index] = result
            else:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(f"{result}; {SKIP_HINT}")
    labels, names = torch.tensor(folder.targets), picture_names(folder)
    if not bad:
        return MemorySplit(pictures, aspects, labels, names)
    print(f"left out {len(bad)} of {len(paths)} in {split}: {_some(list(bad.values()))}")
    good = torch.tensor([index not in bad for index in range(len(paths))])
    lost = sorted(set(folder.targets) - set(labels[good].tolist()))
    if lost:
        raise UserError(f"no readable picture in {folder.root} for {_some([folder.classes[index] for index in lost])}")
    names = [name for index, name in enumerate(names) if index not in bad]
    return MemorySplit(pictures[good], aspects[good], labels[good], names)


# ----------------------------------------------------------------------------------------------------------------------
# Cropping and augmenting, a batch at a time


def normalise(pictures):
    """uint8 to float32 with mean 0.5 and deviation 0.5: from -1 to 1."""
    return pictures.float() / 127.5 - 1


def turn_matrix(turns, aspects):
    """A turn by radians (B,), in fractions of the sides of pictures of these proportions: (B, 2, 2)."""
    cos, sin = turns.cos(), turns.sin()
    return torch.stack([cos, -sin / aspects, sin * aspects, cos], dim=1).unflatten(1, (2, 2))


def crop(pictures, boxes, size: int, flips=None, turns=None, aspects=None):
    """Cut a box out of every picture: (B, channels, S, S) uint8 -> images (B, channels, size, size) float32.

    boxes (B, 4): x1, y1, x2, y2 as fractions of the picture's sides; outside of the picture is black.
    flips (B,) bool: mirrored left to right. turns (B,): radians about the box's centre, of pictures with these aspects.
    The images are scaled to mean 0.5 and deviation 0.5, so from -1 to 1. Bilinear, like torchvision's crops.
    """
    centre = boxes[:, :2] + boxes[:, 2:] - 1  # (B, 2): x, y from -1 to 1 over the picture, as grid_sample counts
    sides = boxes[:, 2:] - boxes[:, :2]  # (B, 2): width, height
    if flips is not None:
        sides = sides * torch.stack([torch.where(flips, -1.0, 1.0), torch.ones_like(sides[:, 1])], dim=1)
    matrix = sides.diag_embed() if turns is None else turn_matrix(turns, aspects) * sides[:, None]  # (B, 2, 2)
    theta = torch.cat([matrix, centre[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, (len(pictures), 1, size, size), align_corners=False)
    return normalise(F.grid_sample(pictures.float(), grid, align_corners=False))


def turn_map(label_map: LabelMap, boxes, turns, aspects) -> LabelMap:
    """Turn label maps about their boxes' centres, as crop turns the pictures. Nearest cell; outside is logit 0."""
    centre = (boxes[:, :2] + boxes[:, 2:] - 1)[:, :, None].to(label_map.logits)  # (B, 2, 1)
    matrix = turn_matrix(turns, aspects).to(centre)
    theta = torch.cat([matrix, centre - matrix @ centre], dim=2)  # (B, 2, 3)
    planes = torch.cat([label_map.logits, label_map.ids.to(centre)], dim=1)  # (B, 2k, H, W)
    grid = F.affine_grid(theta, planes.shape, align_corners=False)
    logits, ids = F.grid_sample(planes, grid, mode="nearest", align_corners=False).chunk(2, dim=1)
    return LabelMap(logits, ids.long())


def flip_map(label_map: LabelMap, boxes, flips) -> tuple[LabelMap, torch.Tensor]:
    """Mirror those label maps left to right, and their boxes with them."""
    planes = (torch.where(flips[:, None, None, None], plane.flip(3), plane) for plane in label_map)
    mirrored = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    return LabelMap(*planes), torch.where(flips[:, None], mirrored, boxes)


def center_crop(pictures, aspects, size: int, share: float = 1.0):
    """The middle square of every picture, its side that share of the shorter side: (B, channels, size, size)."""
    width, height = share * (1 / aspects).clamp(max=1), share * aspects.clamp(max=1)  # fractions of the two sides
    boxes = torch.stack([1 - width, 1 - height, 1 + width, 1 + height], dim=1) / 2
    return crop(pictures, boxes, size)


def random_boxes(aspects, area: tuple[float, float], ratio: tuple[float, float]):
    """A box for every picture, (B, 4) as fractions: its share of the area uniform, its width over height log-uniform,
    its place uniform. As torchvision's RandomResizedCrop; an area above 1 gives boxes around the picture."""
    def uniform(low, high):
        return torch.empty_like(aspects).uniform_(low, high)

    share, shape = uniform(*area), uniform(math.log(ratio[0]), math.log(ratio[1])).exp() / aspects
    longest = max(1, area[1]) ** 0.5
    width, height = (share * shape).sqrt().clamp(max=longest), (share / shape).sqrt().clamp(max=longest)
    left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


def jitter_colour(images, strength: float):
    """Brightness, contrast and saturation, each times a factor of 1 - strength to 1 + strength of its own."""
    def factor():
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(1 - strength, 1 + strength)

    images = (images + 1) * factor() - 1  # black is -1
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * factor()
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * factor()).clamp(-1, 1)


def erase(images, probability: float):
    """Random erasing: a box of 2 % to 33 % of the area filled with noise, in that share of the images.
    Source: the published recipe's "pixel" mode; arXiv:1708.04896."""
    boxes = random_boxes(torch.ones(len(images), device=images.device), (0.02, 1 / 3), (0.3, 1 / 0.3))
    boxes = boxes * (torch.rand(len(images), 1, device=images.device) < probability)
    x1, y1, x2, y2 = (boxes * images.shape[3]).round().T[:, :, None]  # each (B, 1)
    pixel = torch.arange(images.shape[3], device=images.device)
    inside = ((pixel >= y1) & (pixel < y2))[:, :, None] & ((pixel >= x1) & (pixel < x2))[:, None, :]  # (B, size, size)
    return torch.where(inside[:, None], torch.randn_like(images), images)


@dataclass(frozen=True)
class Augmentation:
    """What training does to a Batch, on its device: __call__(batch) -> the Batch with images (B, channels, size, size)
    from -1 to 1 for pictures, and the boxes of these in its label map. All chance is that of torch's global generators.
    """

    size: int  # pixels a side of the images
    area: tuple[float, float] | None = (0.08, 1.0)  # of the crop, as a share of the picture's; None: cropped already
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    flip: float = 0.5  # probability
    turn: float = 0.0  # degrees to either side
    colour: float = 0.0  # strength of jitter_colour
    erasing: float = 0.0  # probability

    def __call__(self, batch: Batch):
        aspects, label_map, boxes = batch.aspects, batch.label_map, batch.boxes
        if self.area is None:
            images = normalise(batch.pictures)
        else:
            flips = torch.rand_like(aspects) < self.flip
            turns = torch.empty_like(aspects).uniform_(-1, 1) * math.radians(self.turn)
            boxes = random_boxes(aspects, self.area, self.ratio)
            images = crop(batch.pictures, boxes, self.size, flips, turns, aspects)
            if label_map is not None:
                label_map = turn_map(label_map, boxes, turns, aspects) if self.turn else label_map
                label_map, boxes = flip_map(label_map, boxes, flips)
        if self.colour:
            images = jitter_colour(images, self.colour)
        images = erase(images, self.erasing) if self.erasing else images
        return batch._replace(pictures=images, label_map=label_map, boxes=boxes)


class StreamAugmentation:
    """The published recipe's picture side: a random crop with a random interpolation, a flip, and RandAugment.

    picture -> (3, size, size) uint8. picture and its LabelMap, (k, H, W) each -> those two and the crop's box (4,) in
    the map; flip and RandAugment then come before the crop, and change both, as published.
    Published: timm's rand-m9-mstd0.5-inc1; torchvision's RandAugment has no spread of the magnitude.
    """

    MODES = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC

    def __init__(self, size: int, area=(0.08, 1.0), flip: float = 0.5, magnitude: int = 9):
        self.size, self.flip = size, flip
        self.crops = [v2.RandomResizedCrop(size, scale=area, interpolation=mode) for mode in self.MODES]
        self.augment = PairedRandAugment(num_ops=2, magnitude=magnitude) if magnitude else None
        self.alone = v2.Compose([v2.RandomChoice(self.crops), v2.RandomHorizontalFlip(flip),
                                 *([self.augment] if magnitude else []), v2.PILToTensor()])

    def __call__(self, picture: Image.Image, label_map: LabelMap | None = None):
        if label_map is None:
            return self.alone(picture)
        planes = torch.cat([label_map.logits, label_map.ids.float()])  # (2k, H, W)
        if torch.rand(()) < self.flip:
            picture, planes = v2.functional.horizontal_flip(picture), planes.flip(2)
        if self.augment is not None:
            picture, planes = self.augment(picture, planes)
        crop = self.crops[int(torch.randint(2, ()))]
        params = crop.make_params([picture])
        top, left, height, width = (params[side] for side in ("top", "left", "height", "width"))
        image = v2.functional.resized_crop(picture, top, left, height, width, [self.size] * 2, crop.interpolation)
        sides = torch.tensor([picture.width, picture.height] * 2)
        logits, ids = planes.chunk(2)
        return (v2.functional.pil_to_tensor(image), LabelMap(logits, ids.long()),
                torch.tensor([left, top, left + width, top + height]) / sides)


class PairedRandAugment(v2.RandAugment):
    """RandAugment of a picture alone, or of a picture and the planes (2k, H, W) of its label map, on which the
    geometric operations act too (nearest cell, outside is 0). torchvision's own refuses a second input."""

    FINER = 8  # subcells a cell, for planes in the picture's proportions: a turn of the square map would be a shear

    def forward(self, picture, planes=None):
        self.planes = None
        if planes is None:
            return super().forward(picture)
        height, width = planes.shape[1:]
        proportions = self.FINER * height, round(self.FINER * height * picture.width / picture.height)
        self.planes = F.interpolate(planes[None], proportions, mode="nearest-exact")[0]
        picture = super().forward(picture)
        return picture, F.interpolate(self.planes[None], (height, width), mode="nearest-exact")[0]

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
        apply = super()._apply_image_or_video_transform
        if self.planes is not None and transform_id.startswith(("Shear", "Translate", "Rotate")):
            scale = self.planes.shape[1] / image.height if transform_id.startswith("Translate") else 1.0  # of pixels
            self.planes = apply(self.planes, transform_id, magnitude * scale, v2.InterpolationMode.NEAREST, fill)
        return apply(image, transform_id, magnitude, interpolation, fill)
