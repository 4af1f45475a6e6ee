"""data.py: every set opened, downloaded or refused."""

import functools
import hashlib
import http.server
import os
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from refiner_min import UserError, data, splits
from tests.pictures import CLASSES, make_folder

# ----------------------------------------------------------------------------------------------------------------------
# Opening the sets


def test_digits():
    digits = data.load_subset("digits", None, 32)
    assert (len(digits.train), len(digits.val)) == (1442, 355) and digits.channels == 1
    assert digits.train.pictures.shape == (1442, 1, 32, 32) and digits.train.pictures.dtype == torch.uint8
    for split, share in ((digits.train, 0.8), (digits.val, 0.2)):  # stratified: no class is dropped or thinned
        counts = split.labels.bincount()
        assert len(counts) == 10 and (counts - share * 179.7).abs().max() < 4
    again = data.load_subset("digits", None, 32)
    assert torch.equal(again.val.pictures, digits.val.pictures)
    with pytest.raises(UserError, match="--data here does not go with --subset digits"):
        data.load_subset("digits", "here", 32)


def test_what_is_held_out_is_a_part_of_each_class_and_is_not_trained_on(pictures):
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] * 40)
    held = data.held_out(labels, 0.1)
    assert labels[held].bincount().tolist() == [2, 1, 4]
    assert held.nonzero()[:, 0].tolist() == [5, 15, 22, 30, 40, 50, 60]  # spread evenly, the middle of each tenth
    with pytest.raises(UserError, match="--hold-out 0.5 needs two training pictures of each class: class 1 has one"):
        data.held_out(torch.tensor([0, 0, 1]), 0.5)
    whole = data.load_subset("folder", str(pictures), 16).train
    for storage in ("memory", "stream"):
        subset = data.load_subset("folder", str(pictures), 16, hold_out=0.25, storage=storage)
        assert (len(subset.train), len(subset.val)) == (18, 6) and subset.train.cropped == (storage == "stream")
        if storage == "memory":
            assert sorted(subset.train.names + subset.val.names) == whole.names
            kept = [whole.names.index(name) for name in subset.train.names]
            assert torch.equal(subset.train.pictures, whole.pictures[kept])
        else:
            assert not set(subset.train.listing.names()) & set(subset.val.listing.names())
        val = data.load_subset("folder", str(pictures), 16, hold_out=0.25, storage=storage, only_val=True)
        assert val.train is None and len(val.val) == 6
    digits, scenes = (data.load_subset(name, None, 32, hold_out=0.1) for name in ("digits", "digit-scenes"))
    assert (len(digits.train), len(digits.val)) == (1299, 143)  # of the 1,442
    assert (len(scenes.train.labels), len(scenes.val.labels)) == (1299, 143)


def test_what_is_held_out_needs_no_validation_pictures(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "val").rename(tmp_path / "elsewhere")
    assert len(data.load_subset("folder", str(root), 16, hold_out=0.5).val) == 9


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "val").rename(root / "test"), "has no folder val/"),
    (lambda root: (root / "val" / CLASSES[0]).rename(root / "val" / "other"), "only one of them has n01440764, other"),
    (lambda root: [file.unlink() for file in (root / "train" / CLASSES[1]).iterdir()], "no pictures in .*train for n0"),
    (lambda root: (root / "train" / "spare").mkdir(), "only one of them has spare"),
])
def test_folders_that_do_not_fit(tmp_path, spoil, message):
    root = make_folder(tmp_path / "set")
    spoil(root)
    with pytest.raises(UserError, match=message):
        data.load_subset("folder", str(root), 16)


def test_a_folder_that_links_to_itself_is_refused(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "train" / CLASSES[0] / "again").symlink_to(root / "train" / CLASSES[0])
    with pytest.raises(UserError, match="are one folder, by a link: its pictures would be read twice"):
        data.load_subset("folder", str(root), 16)


def test_a_folder_that_links_to_itself_twice_is_refused_at_once(tmp_path):
    """Whose paths double with every level."""
    root = make_folder(tmp_path / "set")
    for name in ("x", "y"):
        (root / "train" / CLASSES[0] / name).symlink_to(root / "train" / CLASSES[0])
    with pytest.raises(UserError, match="are one folder, by a link"):
        data.load_subset("folder", str(root), 16)


def test_folders_with_too_little(tmp_path):
    with pytest.raises(UserError, match="has one class, n01440764"):
        data.load_subset("folder", str(make_folder(tmp_path / "class", classes=CLASSES[:1])), 16)
    with pytest.raises(UserError, match="has one class"):  # one picture
        data.load_subset("folder", str(make_folder(tmp_path / "one", train=1, val=1, classes=CLASSES[:1])), 16)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="has no folders in it"):
        data.load_subset("folder", str(tmp_path / "empty"), 16)
    with pytest.raises(UserError, match="--subset folder needs --data DIR"):
        data.load_subset("folder", None, 16)
    with pytest.raises(UserError, match="--subset imagenet needs --data DIR"):
        data.load_subset("imagenet", None, 16)


def test_imagenet_is_streamed_and_has_its_thousand_classes(tmp_path):
    wnids = data.imagenet_wnids()
    assert len(wnids) == 1000 == len(set(wnids)) and wnids == sorted(wnids) and wnids[0] == "n01440764"
    root = make_folder(tmp_path / "imagenet", train=1, val=1, size=(4, 4), classes=wnids)
    subset = data.load_subset("imagenet", str(root), 16)
    assert isinstance(subset.train, splits.StreamSplit) and len(subset.val) == 1000
    with pytest.raises(UserError, match="does not hold ImageNet's 1000 classes"):
        data.load_subset("imagenet", str(make_folder(tmp_path / "other")), 16)


# ----------------------------------------------------------------------------------------------------------------------
# Downloading, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves archives of both downloaded sets, and is where data.py looks for them. Runs in an empty folder."""
    served, here = tmp_path / "served", tmp_path / "here"
    served.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *words: None})
    handler = functools.partial(quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for subset, (name, _, _) in list(data.DOWNLOADS.items()):
            root = make_folder(tmp_path / name)
            for file in root.rglob("*.png"):
                Image.open(file).save(file.with_suffix(".JPEG"))
                file.unlink()
            archive = served / f"{name}.tgz"
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(root, name)
            url = f"http://127.0.0.1:{running.server_port}/{name}.tgz"
            entry = url, hashlib.md5(archive.read_bytes()).hexdigest()
            monkeypatch.setitem(data.DOWNLOADS, subset, (name, *entry))
            if subset == "imagenette":
                monkeypatch.setitem(data.Imagenette._ARCHIVES, "160px", entry)
        yield served
        running.shutdown()


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_a_set_is_downloaded_once(server, subset):
    assert len(data.load_subset(subset, None, 16).train) == 18
    for archive in server.iterdir():
        archive.unlink()
    assert len(data.load_subset(subset, None, 16).train) == 18
    assert os.listdir("data") == [data.DOWNLOADS[subset][0]]


def test_of_two_that_need_it_one_downloads(server, monkeypatch):
    fetched, fetch = [], data._fetch
    monkeypatch.setattr(data, "_fetch", lambda *words: (fetched.append(words[0]), time.sleep(0.3), fetch(*words)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(data._download("imagewoof"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert fetched == ["imagewoof"] and found == [Path("data/imagewoof2-160")] * 2
    assert os.listdir("data") == ["imagewoof2-160"]


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_no_network_and_no_data(server, subset):
    name, url, _ = data.DOWNLOADS[subset]
    (server / f"{name}.tgz").unlink()
    with pytest.raises(UserError) as error:
        data.load_subset(subset, None, 16)
    for part in (f"data/{name}", url, "--subset digits"):
        assert part in str(error.value)
    assert os.listdir() == []


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_an_archive_that_is_not_the_right_one(server, subset):
    name = data.DOWNLOADS[subset][0]
    archive = server / f"{name}.tgz"
    archive.write_bytes(archive.read_bytes() + b"0")
    with pytest.raises(UserError, match=f"no {subset} in"):
        data.load_subset(subset, None, 16)
    assert not (Path("data") / name).exists()
