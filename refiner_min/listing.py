"""Which pictures a folder of classes holds: listed once, kept in a file beside it, and packed.

A list of 1.28 million Python strings would be copied into every process that reads pictures, because Python counts
references in the strings themselves; here all paths are one array of bytes, which the processes share.
It imports foreign (a kept listing is checked as such) and distributed (the first process lists for all).
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from refiner_min import UNFINISHED, UserError, distributed, locked, replacing
from refiner_min.foreign import check_fields

LISTING_FORMAT = 1
FACTS = {"format": int, "classes": list[str], "folders": dict[str, int]}
SETTLED = 2.0  # seconds after which a folder's time tells of another change; some disks count in steps of two seconds


@dataclass(frozen=True)
class Listing:
    """The pictures of root/CLASS/..., by class and path in sorted order."""

    root: Path
    classes: list[str]  # the folders' names
    labels: np.ndarray  # (n,) int64: the class of each picture
    paths: np.ndarray  # uint8: those below root, one after another
    ends: np.ndarray  # (n,) int64: where in paths each ends

    @classmethod
    def of(cls, root: Path, classes: list[str], labels, paths: list[bytes]) -> "Listing":
        ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        return cls(root, classes, np.asarray(labels, np.int64), np.frombuffer(b"".join(paths), np.uint8), ends)

    def __len__(self):
        return len(self.labels)

    def below(self, index: int) -> str:
        """The picture's path from root."""
        return os.fsdecode(self.paths[self.ends[index - 1] if index else 0: self.ends[index]].tobytes())

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.below(index))

    def name(self, index: int) -> str:
        """CLASS/STEM: the picture's path from root without the suffix."""
        return os.path.splitext(self.below(index))[0].replace(os.sep, "/")

    def names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def only(self, chosen) -> "Listing":
        """Of these pictures alone: chosen (n,), bool."""
        rows = np.flatnonzero(chosen)
        paths = [os.fsencode(self.below(row)) for row in rows]
        return Listing.of(self.root, self.classes, self.labels[rows], paths)


def list_pictures(root: Path) -> Listing:
    """The pictures below root, by what an earlier start kept if no folder has changed since; of several processes, as
    the first one finds them, and those of another machine look whether theirs are the same. UserError: they are not;
    root has no folders, or one cannot be listed or is there twice."""
    found = replace(distributed.from_first(lambda: _kept(root) or _list(root)), root=root)
    if not distributed.is_main() and not distributed.local_rank():
        own = _kept(root) or _list(root)
        if not (np.array_equal(own.paths, found.paths) and np.array_equal(own.ends, found.ends)):
            raise UserError(f"{root} does not hold here what it holds on the first machine: {len(own):,} pictures, and "
                            f"{len(found):,} there")
    return found


def walk(folder):
    """Yield (place, names of its files, when it was changed last) of the folder and all below it, links followed.
    UserError: one of them cannot be listed, or is there twice."""
    real, changed = {}, {os.fspath(folder): _changed(folder)}
    for place, below, files in os.walk(folder, onerror=_refuse, followlinks=True):
        twin = real.setdefault(os.path.realpath(place), place)
        if twin != place:
            raise UserError(f"{place} and {twin} are one folder, by a link: its pictures would be read twice")
        yield place, files, changed.pop(place)
        changed |= {path: _changed(path) for path in (os.path.join(place, name) for name in below)}  # not listed yet


def _list(root: Path) -> Listing:
    started, start = time.time_ns(), len(os.path.join(root, ""))
    labels, paths, places = [], [], list(walk(root))
    classes = sorted({place[start:].split(os.sep)[0] for place, *_ in places[1:]})
    if not classes:
        raise UserError(f"{root} has no folders in it: one folder of pictures a class is expected")
    numbers = {name: number for number, name in enumerate(classes)}
    for place, files, _ in sorted(places[1:], key=lambda found: (found[0][start:].split(os.sep)[0], found[0])):
        pictures = [file for file in sorted(files) if has_file_allowed_extension(file, IMG_EXTENSIONS)]
        paths += [os.fsencode(os.path.join(place, file)[start:]) for file in pictures]
        labels += [numbers[place[start:].split(os.sep)[0]]] * len(pictures)
    listing, folders = Listing.of(root, classes, labels, paths), {place[start:]: time for place, _, time in places}
    if max(folders.values()) < started - SETTLED * 1e9:  # else a change in the same tick would not be seen
        _keep(listing, folders)
    return listing


def _refuse(error: OSError):
    raise UserError(f"{error.filename} cannot be listed ({error.strerror})")


def _changed(folder) -> int:
    """When a name was last added to it or taken from it, in nanoseconds."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError as error:
        _refuse(error)


def _files(root: Path) -> list[Path]:
    """Where a listing is kept: beside root, or where nothing may be written there, in torch's cache of the user."""
    own = Path(torch.hub.get_dir()).with_name("refiner_min")
    known = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [root.with_name(f"refiner_min-{root.name}-listing.npz"), own / f"{root.name}-{known}.npz"]


def _keep(listing: Listing, folders: dict[str, int]):
    facts = json.dumps({"format": LISTING_FORMAT, "classes": listing.classes, "folders": folders})
    for path in _files(listing.root):
        with suppress(UserError, OSError):  # without one, the next start lists again
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(f"{path}.lock", f"{path.name}.{UNFINISHED}"), replacing(path) as file:
                np.savez(file, facts=np.frombuffer(facts.encode(), np.uint8), labels=listing.labels,
                         paths=listing.paths, ends=listing.ends)
            return


def _kept(root: Path) -> Listing | None:
    """What is kept, if it is whole and all folders are as they were."""
    for path in _files(root):
        try:
            with np.load(path) as arrays:  # looks at the checksums
                facts, labels, paths, ends = (arrays[name] for name in ("facts", "labels", "paths", "ends"))
            facts = json.loads(facts.tobytes())
            check_fields(facts, FACTS, FACTS)
            if _fits(facts, labels, paths, ends) and all(
                    _changed(root / folder) == time for folder, time in facts["folders"].items()):
                return Listing(root, facts["classes"], labels, paths, ends)
        except Exception:  # none, damage, or a folder that is gone
            continue
    return None


def _fits(facts: dict, labels, paths, ends) -> bool:
    """Whether it is a listing of this version, whose parts go together."""
    bounds = np.concatenate([[0], ends])
    return (facts["format"] == LISTING_FORMAT and "" in facts["folders"] and labels.dtype == ends.dtype == np.int64
            and paths.dtype == np.uint8 and labels.shape == ends.shape and bounds[-1] == len(paths)
            and bool((np.diff(bounds) > 0).all() and np.isin(labels, range(len(facts["classes"]))).all()))
