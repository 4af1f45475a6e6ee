"""A split as batches of uint8 pictures: decoded once and kept in memory, or streamed from disk by worker processes.

    split.to(device), len(split), split.cropped (its pictures are as large as the images), split.note
    split.epoch(indices, batch_size, epoch) -> Batches of the pictures with these indices

scenes.SceneSplit is a third one. It imports listing, foreign, pictures, label_store (the maps that go with pictures),
augment's Batch, hardware and distributed.
"""

import atexit
import gc
import hashlib
import math
import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from refiner_min import UNFINISHED, UserError, distributed, hardware, locked, replacing, seed_for, some
from refiner_min.augment import Batch
from refiner_min.foreign import read_torch
from refiner_min.label_store import LabelFiles, LabelMap, PackedLabels
from refiner_min.listing import Listing
from refiner_min.pictures import SKIP_HINT, read_picture

CACHE_FORMAT = 4
WAIT = 600  # seconds for a picture, after which the disk is said not to answer
_WORKERS = weakref.WeakSet()  # the processes that read pictures


@dataclass(frozen=True)
class PictureMaps:
    """The label maps of a split's pictures, read batch by batch."""

    store: PackedLabels | LabelFiles
    keys: np.ndarray  # each picture's in the store

    def read(self, indices) -> LabelMap:
        return self.store.read(self.keys[indices])


# ----------------------------------------------------------------------------------------------------------------------
# Decoded


@dataclass
class MemorySplit:
    """A decoded split: to train on, every picture squashed to a square, so that a crop is a box of fractions of its
    sides; to evaluate, every picture as evaluation sees it (cropped)."""

    pictures: torch.Tensor  # (n, channels, S, S) uint8
    aspects: torch.Tensor  # (n,) float32
    labels: torch.Tensor  # (n,) int64
    names: list[str] = field(default_factory=list)  # CLASS/STEM of each; a built-in set has none
    maps: PictureMaps | None = None
    cropped: bool = False  # the pictures of a batch are as large as the images
    note = ""  # what a run says of such a set

    def __len__(self):
        return len(self.labels)

    def to(self, device) -> "MemorySplit":
        return replace(self, **{name: getattr(self, name).to(device) for name in ("pictures", "aspects", "labels")})

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices; nothing in them depends on the epoch."""
        batches = indices.split(batch_size)
        for batch, label_map in zip(indices.to(self.labels.device).split(batch_size), self._maps(batches)):
            yield Batch(self.pictures[batch], self.aspects[batch], self.labels[batch], label_map)

    def _maps(self, batches):
        """Each batch's label maps on the device, read from disk while the batch before is trained on."""
        if self.maps is None:
            yield from [None] * len(batches)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.maps.read, batches[0].numpy())
            for following in (*batches[1:], None):
                planes = ahead.result()
                if following is not None:
                    ahead = pool.submit(self.maps.read, following.numpy())
                pinned = (plane.pin_memory() if self.labels.is_cuda else plane for plane in planes)
                yield LabelMap(*(plane.to(self.labels.device, non_blocking=True) for plane in pinned))


def decode(listing: Listing, transform, size: int, name: str, skip_bad: bool) -> MemorySplit:
    """A folder's pictures as transform makes them, PIL picture -> (3, size, size) uint8, from the cache beside it if
    that still fits them; where it can be written, one process makes it for all. name: says what transform does, in the
    cache's name. UserError: a picture that cannot be read; with skip_bad it is left out, if its class keeps one.
    """
    content = hashlib.sha256(f"{CACHE_FORMAT} {name} {skip_bad}".encode())
    for index in range(len(listing)):
        content.update(os.fsencode(listing.below(index)) + _version(Path(listing.path(index))))
    cache = listing.root.with_name(f"refiner_min-{listing.root.name}-{name}.pt")
    wanted = cache, content.hexdigest(), size, len(listing)
    with distributed.first_alone():
        if (kept := _kept(*wanted)) is not None:
            return kept
        with locked(f"{cache}.lock", f"{cache.name}.{UNFINISHED}"):
            if (kept := _kept(*wanted)) is not None:  # made by another machine meanwhile
                return kept
            split = _decode(listing, transform, size, skip_bad)
            _keep(split, cache, content.hexdigest())
            return split


def _keep(split: MemorySplit, cache: Path, key: str):
    try:
        with replacing(cache) as file:
            torch.save({"key": key, "split": (split.pictures, split.aspects, split.labels, split.names)}, file)
    except UserError as error:
        print(f"not cached, so the pictures will be decoded again next time: {error}")


def _version(path: Path) -> bytes:
    """Of a file, size and time of its last change; of what is none, nothing."""
    try:
        found = path.stat()
    except OSError:  # a broken link, which reading will name
        return b" none\n"
    return f" {found.st_size} {found.st_mtime_ns}\n".encode()


def _kept(cache: Path, key: str, size: int, count: int) -> MemorySplit | None:
    """What is in the cache, if it fits and is whole; None: it is to be made again."""
    try:
        stored = read_torch(cache)
        split = MemorySplit(*stored["split"])
        n = len(split.names)
        right = (split.pictures.shape == (n, 3, size, size) and split.pictures.dtype == torch.uint8
                 and split.aspects.shape == split.labels.shape == (n,) and 0 < n <= count)
        return split if right and stored["key"] == key else None
    except Exception:  # no cache, or damage, which shows in many ways
        return None


def _decode(listing: Listing, transform, size: int, skip_bad: bool) -> MemorySplit:
    def read(path):
        try:
            picture = read_picture(path)
        except UserError as error:
            return str(error)
        return transform(picture), picture.width / picture.height

    split, count = listing.root.name, len(listing)
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    aspects, bad = torch.empty(count), {}
    with ThreadPoolExecutor(hardware.available_cores()) as pool:
        results = pool.map(read, map(listing.path, range(count)))
        results = tqdm(results, f"decoding {split}", count, unit=" pictures", disable=None)
        for index, result in enumerate(results):
            if not isinstance(result, str):
                pictures[index], aspects[index] = result
            elif skip_bad:
                bad[index] = result
            else:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(f"{result}; {SKIP_HINT}")
    labels, names = torch.from_numpy(listing.labels), listing.names()
    if not bad:
        return MemorySplit(pictures, aspects, labels, names)
    print(f"left out {len(bad)} of {count} in {split}: {some(list(bad.values()))}")
    good = torch.tensor([index not in bad for index in range(count)])
    lost = sorted(set(labels.tolist()) - set(labels[good].tolist()))
    if lost:
        raise UserError(f"no readable picture in {listing.root} for {some([listing.classes[index] for index in lost])}")
    names = [name for index, name in enumerate(names) if index not in bad]
    return MemorySplit(pictures[good], aspects[good], labels[good], names)


# ----------------------------------------------------------------------------------------------------------------------
# Streamed


class StreamSplit:
    """A split that is read from disk as it is needed, by worker processes.

    transform: PIL picture -> (3, size, size) uint8; with maps, picture and its LabelMap -> those two and the crop's
    box. What is random in it depends on seed, epoch and picture only, never on the workers. keep_workers: they live as
    long as the split does, not for an epoch only. pin_memory: the batches are on their way to a GPU.
    A picture that cannot be read is a UserError naming it, or with skip_bad left out and counted.
    """

    cropped = True  # by the transform: the pictures of a batch are as large as the images
    note = ", streamed"

    def __init__(self, listing: Listing, transform, seed: int = 0, workers: int = 0, skip_bad: bool = False,
                 maps: PictureMaps | None = None, keep_workers: bool = True, pin_memory: bool = False):
        self.listing, self.skip_bad, self.bad = listing, skip_bad, set()
        self.device = torch.device("cpu")
        self.batches = _Batches()
        self.loader = DataLoader(
            _Pictures(listing, transform, maps, seed), batch_sampler=self.batches, collate_fn=_collate,
            pin_memory=pin_memory, persistent_workers=keep_workers and workers > 0, **reader_options(workers),
            generator=torch.Generator())  # its own: training's is not drawn from

    def __len__(self):
        return len(self.listing)

    def to(self, device) -> "StreamSplit":
        """The same split, with the same workers, whose batches are on the device."""
        there = copy(self)
        there.device = torch.device(device)
        return there

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices."""
        self.batches.indices, self.batches.size, self.batches.epoch = indices, batch_size, epoch
        for batch, bad in reading(self.loader):
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


class _Batches:
    """What the workers are to read, drawn up as they go: (index, epoch) of each picture, a list a batch."""

    indices, size, epoch = torch.empty(0, dtype=torch.long), 1, 0

    def __iter__(self):
        for batch in self.indices.split(self.size):
            yield [(index, self.epoch) for index in batch.tolist()]

    def __len__(self):
        return math.ceil(len(self.indices) / self.size)


class _Pictures(Dataset):
    def __init__(self, listing: Listing, transform, maps: PictureMaps | None, seed: int):
        self.listing, self.transform, self.maps, self.seed = listing, transform, maps, seed
        self.draft = getattr(transform, "draft", False) and maps is None

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, index_and_epoch):
        index, epoch = index_and_epoch
        label, crop = torch.tensor(self.listing.labels[index]), None

        def enough(width, height):
            nonlocal crop
            crop = self.transform.draw(width, height)
            return crop.enough(self.transform.size)

        with chance_of("picture", self.seed, epoch, index):
            try:
                picture = read_picture(self.listing.path(index), enough=enough if self.draft else None)
            except UserError as error:
                return str(error)
            if self.maps is None:
                image = self.transform(picture) if crop is None else self.transform(picture, crop=crop)
                return image, torch.tensor(1.0), label
            try:
                label_map = self.maps.read([index])
            except UserError as error:
                return _BadMap(error)
            image, label_map, box = self.transform(picture, LabelMap(*(plane[0] for plane in label_map)))
            return image, torch.tensor(1.0), label, label_map, box


@contextmanager
def chance_of(*use):
    """Within it, what is drawn on the CPU comes from the seed for that use. torch.manual_seed would cost as much as
    half the decoding: it asks the GPU, too, and notes from where."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed_for(*use))
    try:
        yield
    finally:
        generator.set_state(state)


class _BadMap(str):
    """What is wrong with a label map. Unlike a picture that is bad, it is not left out."""


def _collate(samples) -> tuple[Batch | None, list[str]]:
    good = [sample for sample in samples if not isinstance(sample, str)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    if not good:
        return None, bad
    rows_first = [(picture.permute(1, 2, 0), *rest) for picture, *rest in good]  # as they lie in memory: faster
    pictures, *rest = default_collate(rows_first)
    return Batch(pictures.permute(0, 3, 1, 2), *rest), bad


def reading(loader: DataLoader):
    """What the loader gives, while its workers are known to kill_workers."""
    loaded = iter(loader)
    _WORKERS.update(getattr(loaded, "_workers", ()))  # none where this process reads itself
    yield from loaded


@contextmanager
def readers_told():
    """What goes wrong with the processes that read pictures as a UserError. It is for all of a command, since torch
    tells of a process that was killed wherever the main one is by then."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):  # of what goes wrong in a worker's own code it begins otherwise
            raise
        if "timed out" in str(error):
            raise UserError(f"no picture was read for {WAIT / 60:g} minutes: does the disk answer?") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"a process that reads pictures has ended ({reason}): it is usually killed for want of memory, "
                        f"and fewer --workers need less") from None


@atexit.register
def kill_workers():
    """Those whose loader somebody still holds when Python exits, as an error's traceback does: Python would end them by
    SIGTERM, which they ignore, and wait for ever."""
    if _WORKERS:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would tell that they end
    for worker in _WORKERS:
        if worker.is_alive():
            worker.kill()


def reader_options(workers: int) -> dict:
    """What every DataLoader is given so that its workers end with the command, and a disk that hangs is told."""
    return dict(num_workers=workers, worker_init_fn=_begin, timeout=WAIT if workers else 0)


def _begin(worker: int):
    """As a worker. Ctrl-C and a scheduler's SIGTERM reach the workers too; whether to stop is for the main one to
    say. What Python's collector looked through, each worker would have a copy of; so it leaves out what is there."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()
