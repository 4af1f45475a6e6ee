"""The data sets and their augmentation, from the built-in digits to ImageNet.

A small set is decoded once to squares of uint8, cached beside its pictures, kept on the training device and augmented
there, a whole batch at a time but every picture in its own way. ImageNet streams through DataLoader workers.

    load_subset(...) -> Subset of two splits
    split.epoch(...) -> batches of (pictures as uint8, aspects, labels); Augmentation or center_crop makes them images

It imports no other module of the package.
"""

import hashlib
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from tqdm import tqdm

from refiner_min import UserError, replacing

ASSETS = Path(__file__).parent / "assets"
SUBSETS = ("digits", "imagenette", "imagewoof", "imagenet", "folder")
DOWNLOADS = {  # subset: folder that the archive holds, address, md5
    "imagenette": ("imagenette2-160", *Imagenette._ARCHIVES["160px"]),
    "imagewoof": ("imagewoof2-160", "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-160.tgz",
                  "3d200a7be99704a0d7509be2a9fbfe15"),
}
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded pictures; a larger folder streams
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


@dataclass
class MemorySplit:
    """A decoded split: every picture squashed to a square, so that a crop is a box of fractions of its sides."""

    pictures: torch.Tensor  # (n, channels, S, S) uint8
    aspects: torch.Tensor  # (n,) float32, width over height before the squashing
    labels: torch.Tensor  # (n,) int64
    cropped = False  # the pictures of a batch are whole

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return MemorySplit(self.pictures.to(device), self.aspects.to(device), self.labels.to(device))

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield (pictures, aspects, labels) of the indices, batch by batch; nothing in them depends on the epoch."""
        for batch in indices.to(self.labels.device).split(batch_size):
            yield self.pictures[batch], self.aspects[batch], self.labels[batch]


class StreamSplit:
    """A split that is read from disk as it is needed, by worker processes that live as long as it does.

    transform: PIL picture -> (3, size, size) uint8. What is random in it depends on seed, epoch and picture only, never
    on the workers. A picture that cannot be read is a UserError naming it, or with skip_bad left out and counted.
    """

    cropped = True  # by the transform: the pictures of a batch are as large as the images

    def __init__(self, folder: ImageFolder, transform, seed: int = 0, workers: int = 0, skip_bad: bool = False):
        self.folder, self.transform, self.seed, self.workers = folder, transform, seed, workers
        self.skip_bad, self.bad = skip_bad, set()
        self.device = torch.device("cpu")
        self.batches = []  # of (index, seed), filled anew for every epoch
        self.loader = DataLoader(
            _Samples(folder.samples, transform), batch_sampler=self.batches, num_workers=workers, collate_fn=_collate,
            pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0, worker_init_fn=_ignore_signals,
            generator=torch.Generator())  # its own, so that it does not draw from training's

    def __len__(self):
        return len(self.folder.samples)

    def to(self, device):
        self.device = torch.device(device)
        return self

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield (pictures, aspects, labels) of the indices, batch by batch."""
        seeded = [(index, hash((self.seed, epoch, index))) for index in indices.tolist()]
        self.batches[:] = [seeded[start:start + batch_size] for start in range(0, len(seeded), batch_size)]
        for pictures, labels, bad in self.loader:
            for message in bad:
                self._leave_out(message)
            if not len(labels):
                raise UserError(f"no picture of a whole batch could be read; the last one: {bad[-1]}")
            pictures, labels = (tensor.to(self.device, non_blocking=True) for tensor in (pictures, labels))
            yield pictures, torch.ones(len(labels), device=self.device), labels

    def _leave_out(self, message: str):
        if not self.skip_bad:
            raise UserError(f"{message}; {SKIP_HINT}")
        if message not in self.bad:
            self.bad.add(message)
            tqdm.write(f"left out, {len(self.bad)} so far: {message}")


class _Samples(Dataset):
    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        path, label = self.samples[index]
        try:
            picture = read_picture(path)
        except UserError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(picture), label


def _collate(samples):
    good = [sample for sample in samples if not isinstance(sample, str)]
    pictures, labels = default_collate(good) if good else (torch.empty(0), torch.empty(0))
    return pictures, labels, [sample for sample in samples if isinstance(sample, str)]


def _ignore_signals(worker: int):
    """Ctrl-C and a scheduler's SIGTERM reach the workers too; whether to stop is for the training process to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Subset:
    name: str
    root: str | None  # its folder; None for what is built in
    train: MemorySplit | StreamSplit
    val: MemorySplit | StreamSplit
    classes: list[str]  # folder names in sorted order: class k is classes[k]
    channels: int = 3

    @property
    def class_names(self) -> list[str]:
        """What a reader calls the classes."""
        return [CLASS_NAMES.get(name, name) for name in self.classes]


# ----------------------------------------------------------------------------------------------------------------------
# Opening a subset


def load_subset(subset: str, data: str | None, size: int, *, eval_crop: float = 1.0, seed: int = 0, workers: int = 0,
                skip_bad: bool = False, transform=None) -> Subset:
    """Open a subset by name for images of size x size pixels.

    data: the extracted folder with train/ and val/; None looks in data/ and downloads what can be downloaded.
    For a streamed set: eval_crop, the share of the shorter side that evaluation keeps; transform, that of training.
    UserError: what is missing, empty or unreadable.
    """
    if subset == "digits":
        if data is not None:
            raise UserError(f"--data {data} does not go with --subset digits, which is built in: add --subset folder")
        return _digits(size)
    if data is None and subset not in DOWNLOADS:
        raise UserError(f"--subset {subset} needs --data DIR, the folder that holds train/ and val/")
    root = Path(data) if data is not None else _download(subset)
    folders = {split: _open_folder(root, split) for split in ("train", "val")}
    classes = _check_folders(root, folders, subset)
    stored = stored_size(size)
    count = sum(len(folder.samples) for folder in folders.values())
    if subset == "imagenet" or count * 3 * stored**2 > MEMORY_LIMIT:
        resize = v2.Resize(math.floor(size / eval_crop), v2.InterpolationMode.BICUBIC)
        whole = v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])
        options = dict(seed=seed, workers=workers, skip_bad=skip_bad)
        return Subset(subset, str(root), StreamSplit(folders["train"], transform or stream_transform(size), **options),
                      StreamSplit(folders["val"], whole, **options), classes)
    return Subset(subset, str(root), *_decode(root, folders, stored, skip_bad), classes)


def _digits(size: int) -> Subset:
    """The built-in digits, enlarged once with bicubic interpolation; every fifth of a class is for validation."""
    with np.load(ASSETS / "digits.npz") as asset:
        images, labels = torch.from_numpy(asset["images"]), torch.from_numpy(asset["labels"]).long()
    enlarged = F.interpolate(images[:, None] * (255 / 16), (size, size), mode="bicubic")  # (n, 1, size, size)
    pictures = enlarged.round().clamp(0, 255).to(torch.uint8)
    rank_in_class = torch.empty_like(labels)
    for digit in labels.unique():
        rank_in_class[labels == digit] = torch.arange(int((labels == digit).sum()))
    splits = [MemorySplit(pictures[chosen], torch.ones(int(chosen.sum())), labels[chosen])
              for chosen in (rank_in_class % 5 != 4, rank_in_class % 5 == 4)]
    return Subset("digits", None, *splits, [str(digit) for digit in range(10)], channels=1)


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
    if subset == "imagenet" and train.classes != (ASSETS / "imagenet_wnids.txt").read_text().split():
        raise UserError(f"{root} does not hold ImageNet's 1000 classes (it has {len(train.classes)}, "
                        f"{train.classes[0]} first): --subset folder takes any classes")
    return train.classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    key = hashlib.sha256(f"{size} {skip_bad}\n{listing}".encode()).hexdigest()
    cache = root / f"refiner_min-{size}px.pt"
    try:
        stored = torch.load(cache, weights_only=True)
        if stored["key"] == key:
            return [MemorySplit(*tensors) for tensors in stored["splits"]]
    except Exception:  # no cache, or a damaged one: it is made again
        pass
    splits = [_decode_split(folder, split, size, skip_bad) for split, folder in folders.items()]
    try:
        with replacing(cache) as file:
            torch.save({"key": key, "splits": [(s.pictures, s.aspects, s.labels) for s in splits]}, file)
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
    labels = torch.tensor(folder.targets)
    if not bad:
        return MemorySplit(pictures, aspects, labels)
    print(f"left out {len(bad)} of {len(paths)} in {split}: {_some(list(bad.values()))}")
    good = torch.tensor([index not in bad for index in range(len(paths))])
    lost = sorted(set(folder.targets) - set(labels[good].tolist()))
    if lost:
        raise UserError(f"no readable picture in {folder.root} for {_some([folder.classes[index] for index in lost])}")
    return MemorySplit(pictures[good], aspects[good], labels[good])


# ----------------------------------------------------------------------------------------------------------------------
# Cropping and augmenting, a batch at a time


def normalise(pictures):
    """uint8 to float32 with mean 0.5 and deviation 0.5: from -1 to 1."""
    return pictures.float() / 127.5 - 1


def crop(pictures, boxes, size: int, flips=None, turns=None):
    """Cut a box out of every picture: (B, channels, S, S) uint8 -> images (B, channels, size, size) float32.

    boxes (B, 4): x1, y1, x2, y2 as fractions of the picture's sides; outside of the picture is black.
    flips (B,) bool: mirrored left to right. turns (B,): radians about the box's centre.
    The images are scaled to mean 0.5 and deviation 0.5, so from -1 to 1. Bilinear, like torchvision's crops.
    """
    centre = boxes[:, :2] + boxes[:, 2:] - 1  # (B, 2): x, y from -1 to 1 over the picture, as grid_sample counts
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)  # (B,)
    mirror = torch.ones_like(width) if flips is None else torch.where(flips, -1.0, 1.0)
    cos, sin = (torch.ones_like(width), torch.zeros_like(width)) if turns is None else (turns.cos(), turns.sin())
    rows = [torch.stack([width * cos * mirror, -height * sin, centre[:, 0]], dim=1),
            torch.stack([width * sin * mirror, height * cos, centre[:, 1]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), (len(pictures), 1, size, size), align_corners=False)
    return normalise(F.grid_sample(pictures.float(), grid, align_corners=False))


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
    """What training does to a batch of pictures, on their device: __call__(pictures, aspects) -> images.
    All its chance comes from torch's global generators."""

    size: int  # pixels a side of the images
    area: tuple[float, float] | None = (0.08, 1.0)  # of the crop, as a share of the picture's; None: cropped already
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    flip: float = 0.5  # probability
    turn: float = 0.0  # degrees to either side
    colour: float = 0.0  # strength of jitter_colour
    erasing: float = 0.0  # probability

    def __call__(self, pictures, aspects):
        if self.area is None:
            images = normalise(pictures)
        else:
            flips = torch.rand_like(aspects) < self.flip
            turns = torch.empty_like(aspects).uniform_(-1, 1) * math.radians(self.turn)
            images = crop(pictures, random_boxes(aspects, self.area, self.ratio), self.size, flips, turns)
        if self.colour:
            images = jitter_colour(images, self.colour)
        return erase(images, self.erasing) if self.erasing else images


def stream_transform(size: int, area=(0.08, 1.0), flip: float = 0.5, magnitude: int = 9) -> v2.Transform:
    """The published recipe's picture side: a random crop with a random interpolation, a flip, and RandAugment.
    Published: timm's rand-m9-mstd0.5-inc1; torchvision's RandAugment has no spread of the magnitude."""
    crops = [v2.RandomResizedCrop(size, scale=area, interpolation=mode)
             for mode in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)]
    augment = [v2.RandAugment(num_ops=2, magnitude=magnitude)] if magnitude else []
    return v2.Compose([v2.RandomChoice(crops), v2.RandomHorizontalFlip(flip), *augment, v2.PILToTensor()])
