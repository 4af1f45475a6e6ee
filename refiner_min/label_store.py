"""Label maps on disk: the packed store, read and written, and the published layout, read; what does not fit is refused.

A label map is what an annotator network says of every place of a picture: for each of H x W cells its k largest class
logits and their classes. A store holds those of a whole training split; its maps are read batch by batch.
Source: token labeling, arXiv:2104.10858; ReLabel, arXiv:2101.05022; the packed store is ours. It imports foreign.
"""

import errno
import json
import math
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refiner_min import UserError, replacing, some, write_json
from refiner_min.foreign import check_fields, read_torch


class LabelMap(NamedTuple):
    logits: torch.Tensor  # (B, k, H, W) float32, largest first; a class that is not among them counts as logit 0
    ids: torch.Tensor  # (B, k, H, W) int64


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
    """One store for a whole set: labels.json (annotator, size, classes, shape, rows done, names skipped, how rows were
    made), pictures.txt (the name of row i in line i), logits.f16 and ids.i16 (n, k, H, W), which stay on the disk and
    are mapped into memory."""

    FACTS, NAMES, LOGITS, IDS = "labels.json", "pictures.txt", "logits.f16", "ids.i16"
    FIELDS = {"annotator": str, "size": int, "classes": list[str], "shape": list[int], "done": int,
              "skipped": list[str]}
    WAYS = {"from": int, "how": str}  # of each in "made", which older stores have not got

    def __init__(self, folder: Path, classes: list[str]):
        facts, names = self.describe(folder)
        if facts["classes"] != classes:
            other = sorted(set(facts["classes"]) ^ set(classes)) or ["another order"]
            raise UserError(f"{folder} was made for other classes ({len(facts['classes'])}; the set has "
                            f"{len(classes)}; different: {some(other)})")
        if facts["done"] < len(names):
            raise UserError(f"{folder} is not complete ({facts['done']} of {len(names)} pictures): the command that "
                            f"began it goes on with --resume")
        self.folder, self.num_classes, self.shape = folder, len(classes), (len(names), *facts["shape"])
        self.annotator, self.skipped = f"{facts['annotator']} at {facts['size']} px", set(facts["skipped"])
        self.check_size(folder, facts, whole=True)

    @classmethod
    def describe(cls, folder: Path) -> tuple[dict, list[str]]:
        """What labels.json says, and the pictures' names. UserError: they are damaged."""
        try:
            facts = json.loads((folder / cls.FACTS).read_text())
            names = cls.unpack((folder / cls.NAMES).read_bytes())
            cls.check(facts, names)
            return facts, names
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder} is a damaged store of label maps ({error}): make it again") from None

    @classmethod
    def check(cls, facts, names: list[str]):
        """ValueError: labels.json holds no such facts, or facts that cannot be, or that do not go with pictures.txt."""
        check_fields(facts, cls.FIELDS | {"made": list[dict]}, cls.FIELDS)
        for way in facts.get("made", ()):
            check_fields(way, cls.WAYS, cls.WAYS)
        shape, done = facts["shape"], facts["done"]
        if len(shape) != 3 or shape[1] != shape[2] or not (1 <= shape[0] <= len(facts["classes"]) and shape[1] >= 1):
            raise ValueError(f"maps of shape {shape} for {len(facts['classes'])} classes in {cls.FACTS}")
        if not 0 <= done <= len(names) or len(set(names)) < len(names) or not set(names).issuperset(facts["skipped"]):
            raise ValueError(f"{cls.FACTS} and {cls.NAMES} do not go together")

    @classmethod
    def check_size(cls, folder: Path, facts: dict, whole: bool = False):
        """UserError if the files hold fewer rows than labels.json says, or, of a whole store, not just as many."""
        expected = 2 * facts["done"] * math.prod(facts["shape"])  # bytes
        for path in (folder / cls.LOGITS, folder / cls.IDS):
            size = path.stat().st_size if path.is_file() else 0
            if size < expected or whole and size > expected:
                raise UserError(f"{folder} is a damaged store of label maps ({path.name} is "
                                f"{'shorter' if size < expected else 'longer'} than the {expected:,} bytes that "
                                f"{cls.FACTS} speaks of): make it again")

    @staticmethod
    def pack(names: list[str]) -> bytes:
        return "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")

    @staticmethod
    def unpack(names: bytes) -> list[str]:
        return names.decode("utf-8", "surrogateescape").split("\n")[:-1]

    def find(self, names: list[str]) -> np.ndarray:
        """The rows of the pictures. UserError: how many have none, or that two have the same."""
        _, lines = self.describe(self.folder)
        rows = {name: row for row, name in enumerate(lines) if name not in self.skipped}
        _check_found(self.folder, names, names, rows)
        found = np.array([rows[name] for name in names])
        self.read(found[:1])  # so that what is wrong is told before training starts
        return found

    def planes(self) -> tuple[np.memmap, np.memmap]:
        """Mapped anew for every read: nothing to send to a worker process, and no page stays in memory."""
        return (np.memmap(self.folder / self.LOGITS, "<f2", "r", shape=self.shape),
                np.memmap(self.folder / self.IDS, "<i2", "r", shape=self.shape))

    def read(self, rows) -> LabelMap:
        logits, ids = (torch.from_numpy(plane[rows]) for plane in self.planes())
        sources = [f"row {row} of {self.folder}" for row in rows]
        if (logits[:, 1:] > logits[:, :-1]).any():  # as of maps that are read with another one's shape
            raise UserError(f"{sources[0]}, or one beside it, holds logits that are not the largest first")
        return _checked(LabelMap(logits.float(), ids.long()), self.num_classes, sources)


class LabelWriter:
    """A packed store while it is written, by one process or several, each its rows at their places in the files.
    labels.json says how many of the first rows count; what killed processes left beyond them is written again."""

    @staticmethod
    def begin(folder: Path, facts: dict, names: list[str], made: str, resume: bool) -> dict:
        """What labels.json says of a new store, or of the one that is gone on with; one process asks, for all of them.
        made: how the next rows are; with the row that each begins at, all of a store's ways stand in labels.json.
        UserError: there is a store that is not to be gone on with, or it cannot be written."""
        found = facts | {"done": 0, "skipped": [], "made": []}
        if (folder / PackedLabels.FACTS).exists():
            found, there = PackedLabels.describe(folder)
            differing = [name for name, value in facts.items() if found.get(name) != value]
            differing += ["pictures"] if there != names else []
            if differing or not resume:
                why = f"it differs in {', '.join(differing)}" if differing else "--resume goes on with it"
                raise UserError(f"{folder} holds {found['done']} of {len(there)} label maps already and is not "
                                f"written over: {why}, --out DIR begins another one")
            PackedLabels.check_size(folder, found)
            found.setdefault("made", [{"from": 0, "how": "as an older version did"}])
        ways = [way for way in found["made"] if way["from"] < found["done"]]
        if found["done"] < len(names) and (not ways or ways[-1]["how"] != made):
            ways.append({"from": found["done"], "how": made})
        found["made"] = ways
        with replacing(folder / PackedLabels.NAMES) as file:
            file.write(PackedLabels.pack(names))
        write_json(folder / PackedLabels.FACTS, found)
        return found

    def __init__(self, folder: Path, facts: dict, names: list[str]):
        """facts: begin's. UserError: the store cannot be written, or was not begun for these pictures."""
        self.folder, self.facts, self.row = folder, facts, 2 * math.prod(facts["shape"])  # bytes
        try:
            if (folder / PackedLabels.NAMES).read_bytes() != PackedLabels.pack(names):
                raise ValueError("the processes do not find the same pictures")
            for name in (PackedLabels.LOGITS, PackedLabels.IDS):
                (folder / name).touch()
            self.files = [open(folder / name, "r+b", buffering=0) for name in (PackedLabels.LOGITS, PackedLabels.IDS)]
            for file in self.files:
                file.truncate(len(names) * self.row)  # the same for whoever comes first: nothing is lost to another
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be used for the label maps ({error})") from None

    def write(self, first: int, maps: LabelMap):
        """The maps of a batch, at row first. UserError: no room for them."""
        if not maps.logits.half().isfinite().all():
            raise UserError(f"{self.facts['annotator']} gives logits that are not finite on this device: --device cpu")
        with self._told():
            for file, plane, dtype in zip(self.files, maps, ("<f2", "<i2")):
                content = plane.numpy().astype(dtype).tobytes()
                file.seek(first * self.row)
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self):
        """See to it that what was written is on the disk. UserError: no room."""
        with self._told():
            for file in self.files:
                os.fsync(file.fileno())

    def count(self, done: int, skipped: list[str]):
        """Let the first so many rows count, of which every process has synced its own; one process says so, for all.
        skipped: the names among them that are not to be used. UserError: no room."""
        self.facts |= {"done": done, "skipped": skipped}
        write_json(self.folder / PackedLabels.FACTS, self.facts)

    @contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder} could not be written ({error}); --resume goes on when it can be") from None


class LabelFiles:
    """The published layout: FOLDER/CLASS/STEM.pt, a tensor (2, k, H, W) of logits and ids; STEM ends at the first dot
    of the picture's name. NFNet-F6's maps are 18 x 18, ReLabel's 15 x 15. Source: published, tlt/data/dataset.py."""

    def __init__(self, folder: Path, num_classes: int):
        self.folder, self.num_classes, self.annotator, self.skipped = folder, num_classes, "published files", set()

    def find(self, names: list[str]) -> np.ndarray:
        """The files of the pictures, below the folder. UserError: how many have none, or that two have the same."""
        there = {f"{path.parent.name}/{path.stem}" for path in self.folder.glob("*/*.pt")}
        stems = [f"{Path(name).parts[0]}/{Path(name).name.split('.')[0]}" for name in names]
        _check_found(self.folder, names, stems, there)
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
            planes = read_torch(path)
            if not isinstance(planes, torch.Tensor):
                raise ValueError(f"a {type(planes).__name__} instead of a tensor")
            if planes.ndim != 4 or len(planes) != 2 or not planes.numel():
                raise ValueError(f"shape {tuple(planes.shape)} instead of (2, k, H, W)")
            if not (planes[1] == planes[1].round()).all():
                raise ValueError("class ids that are no whole numbers")
        except Exception as error:  # torch.load raises many kinds
            raise UserError(f"{path} is no label map ({(str(error) or repr(error)).splitlines()[0]})") from None
        return planes


def _check_found(folder: Path, names: list[str], keys: list[str], there):
    """UserError: a picture has no map there by its key, or two have one."""
    found = [key in there for key in keys]
    if not all(found):
        raise UserError(f"{folder} has no map for {found.count(False)} of the {len(names)} training pictures, "
                        f"{names[found.index(False)]} the first of them: was it made for this set?")
    (key, count), = Counter(keys).most_common(1)
    if count > 1:
        raise UserError(f"{folder} has one map for {count} training pictures that are called {key}: rename all but the "
                        f"one that it was made of")


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
