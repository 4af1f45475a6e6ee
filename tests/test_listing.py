"""listing.py: the same pictures as torchvision's, listed once, packed, and listed again when a folder has changed."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from refiner_min import UserError, listing
from refiner_min.listing import list_pictures
from tests.pictures import CLASSES, make_folder


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A folder of classes that nobody has changed for an hour."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "set", size=(4, 4)) / "train"
    (root / CLASSES[0] / "below").mkdir()
    (root / CLASSES[0] / "below" / "a.b.JPEG").write_bytes(b"")
    (root / CLASSES[1] / "notes.txt").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(root / CLASSES[2]) + b"/\xff.png")).write_bytes(b"")
    settle(root)
    return root


def settle(root):
    for place, *_ in os.walk(root):
        os.utime(place, (time.time() - 3600,) * 2)


def samples(found):
    return [(found.path(index), int(found.labels[index])) for index in range(len(found))]


@pytest.fixture
def kept_only(monkeypatch):
    """From here on nothing is listed anew."""
    return lambda: monkeypatch.setattr(listing, "_list", lambda root: pytest.fail("listed again"))


def test_the_pictures_are_those_of_torchvision_in_its_order(settled, kept_only):
    """Not that of the folders' walk alone: "a-b" comes between "a" and "a/c"."""
    (settled / CLASSES[0] / "below-that").mkdir()
    Image.new("L", (4, 4)).save(settled / CLASSES[0] / "below-that" / "0.png")
    settle(settled)
    folder, found = ImageFolder(settled), list_pictures(settled)
    assert (samples(found), found.classes) == (folder.samples, folder.classes) and len(found) == 21
    assert {f"{CLASSES[0]}/below/a.b", f"{CLASSES[2]}/{os.fsdecode(bytes([255]))}"} <= set(found.names())
    kept_only()
    assert samples(list_pictures(settled)) == folder.samples


def test_some_of_the_pictures(settled):
    found = list_pictures(settled)
    chosen = np.arange(len(found)) % 3 == 1
    assert samples(found.only(chosen)) == [sample for sample, here in zip(samples(found), chosen) if here]
    assert len(found.only(np.zeros(len(found), bool))) == 0


@pytest.mark.parametrize("change", [
    lambda root: (root / CLASSES[1] / "new.png").write_bytes(b""),
    lambda root: (root / CLASSES[1] / "0.png").unlink(),
    lambda root: (root / CLASSES[1] / "0.png").rename(root / CLASSES[1] / "9.png"),
    lambda root: (root / CLASSES[0] / "below" / "new.png").write_bytes(b""),
    lambda root: (root / "another").mkdir(),
    lambda root: (root / CLASSES[1]).rename(root.parent / "away"),
], ids=["new", "gone", "renamed", "new below", "class", "class gone"])
def test_a_folder_that_has_changed_is_listed_again(settled, change):
    list_pictures(settled)
    change(settled)
    folder = ImageFolder(settled, allow_empty=True)
    found = list_pictures(settled)
    assert (samples(found), found.classes) == (folder.samples, folder.classes)


def test_a_folder_that_has_just_changed_is_not_kept(settled):
    (settled / CLASSES[0] / "new.png").write_bytes(b"")
    list_pictures(settled)
    assert not list(settled.parent.glob("*listing*"))
    settle(settled)
    list_pictures(settled)
    assert [file.name for file in settled.parent.glob("*listing*")] == ["refiner_min-train-listing.npz"]


def test_a_damaged_listing_is_made_again(settled):
    whole = samples(list_pictures(settled))
    kept = settled.parent / "refiner_min-train-listing.npz"
    content = kept.read_bytes()
    place = content.index(b"n01440764/0.png")
    for damaged in (content[:300], content[:place] + b"m" + content[place + 1:], b"", b"no archive"):
        kept.write_bytes(damaged)
        assert samples(list_pictures(settled)) == whole


def test_where_nothing_may_be_written_the_listing_is_in_the_users_cache(settled, monkeypatch, kept_only):
    replacing = listing.replacing

    def read_only(path):
        if path.parent == settled.parent:
            raise UserError("read-only")
        return replacing(path)

    monkeypatch.setattr(listing, "replacing", read_only)
    monkeypatch.setenv("TORCH_HOME", str(settled / CLASSES[0] / "0.png"))
    whole = samples(list_pictures(settled))  # nowhere at all
    monkeypatch.setenv("TORCH_HOME", str(settled.parents[1] / "cache"))
    assert samples(list_pictures(settled)) == whole
    [kept] = (settled.parents[1] / "cache" / "refiner_min").iterdir()
    assert kept.name.startswith("train-") and not list(settled.parent.glob("*listing*"))
    kept_only()
    assert samples(list_pictures(settled)) == whole


def test_a_folder_that_cannot_be_listed_is_told(settled, monkeypatch):
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("below"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="below cannot be listed .Permission denied"):
        list_pictures(settled)


def test_a_set_that_was_moved_keeps_its_listing(settled, kept_only):
    names = list_pictures(settled).names()
    moved = settled.parent.rename(settled.parents[1] / "moved")
    kept_only()
    found = list_pictures(moved / "train")
    assert found.names() == names and found.path(0).startswith(str(moved))


def test_a_listing_is_small(settled):
    """Some bytes a picture for its path, and 16 for the two numbers: nothing that is counted a picture."""
    found = list_pictures(settled)
    longer = found.only(np.ones(len(found), bool))
    assert found.paths.nbytes == sum(len(os.fsencode(found.below(index))) for index in range(len(found)))
    assert len(pickle.dumps(longer)) < found.paths.nbytes + 16 * len(found) + 1000
