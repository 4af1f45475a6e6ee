"""label_store.py: both kinds of store give back their maps, in little memory, or say what is wrong with them."""

import json
import math
import os
import pickle
import sys

import numpy as np
import pytest
import torch

from refiner_min import UserError
from refiner_min.label_store import open_labels
from tests.pictures import CLASSES, pack_labels, random_labels
from tests.test_checkpoint import RunsCode

NAMES = ["n01440764/a", "n01440764/b", "n02102040/a", "n02979186/c.d"]


@pytest.fixture
def store(tmp_path):
    return pack_labels(tmp_path / "labels", NAMES, *random_labels(4))


@pytest.fixture
def files(tmp_path):
    logits, ids = random_labels(4)
    for name, planes in zip(NAMES, np.stack([logits, ids.astype(np.float16)], axis=1)):
        path = tmp_path / "files" / f"{name.split('.')[0]}.pt"  # a published stem ends at the first dot
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(planes), path)
    return tmp_path / "files"


def test_both_kinds_of_store_give_back_their_maps(store, files):
    logits, ids = random_labels(4)
    order = [NAMES[2], NAMES[0], NAMES[3]]
    for folder in (store, files):
        labels = open_labels(folder, list(CLASSES))
        keys = labels.find(order)
        maps = labels.read(keys[[2, 0]])
        assert maps.logits.dtype == torch.float32 and maps.ids.dtype == torch.int64
        assert torch.equal(maps.logits, torch.from_numpy(logits[[3, 2]]).float())
        assert torch.equal(maps.ids, torch.from_numpy(ids[[3, 2]].copy()))
        assert labels.annotator


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_store(tmp_path):
    """Reading all of a store of 200 MB, picture by picture, and sending it to a worker."""
    names = [f"{CLASSES[0]}/{index}" for index in range(50_000)]
    folder = pack_labels(tmp_path / "labels", names, *random_labels(1, grid=1))
    for file in (folder / "logits.f16", folder / "ids.i16"):
        os.truncate(file, 50_000 * 5 * 20 * 20 * 2)  # sparse
    facts = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(facts | {"shape": [5, 20, 20], "done": 50_000}))
    labels = open_labels(folder, list(CLASSES))
    keys = labels.find(names)
    assert len(pickle.dumps(labels)) < 1000

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for rows in np.array_split(keys, 500):
        labels.read(rows)
    assert resident() - before < 50e6


@pytest.mark.parametrize("kind", ["store", "files"])
def test_pictures_without_a_map_are_counted(kind, request):
    labels = open_labels(request.getfixturevalue(kind), list(CLASSES))
    with pytest.raises(UserError, match="has no map for 2 of the 3 training pictures, n01440764/x the first of them"):
        labels.find(["n01440764/x", NAMES[0], "other/a"])


def test_pictures_that_were_left_out_have_no_map(tmp_path):
    folder = pack_labels(tmp_path / "labels", NAMES, *random_labels(4), skipped=[NAMES[1]])
    with pytest.raises(UserError, match=f"has no map for 1 of the 4 training pictures, {NAMES[1]}"):
        open_labels(folder, list(CLASSES)).find(NAMES)


@pytest.mark.parametrize("facts, message", [
    (dict(classes=["n01440764", "n02102040", "other"]), "made for other classes .*different: n02979186, other"),
    (dict(classes=list(reversed(CLASSES))), "different: another order"),
    (dict(done=3), "is not complete .3 of 4 pictures.* goes on with --resume"),
    (dict(shape=[2, 9, 9]), "is a damaged store"),
    (dict(shape="none"), "is a damaged store"),
])
def test_stores_that_do_not_fit(tmp_path, facts, message):
    folder = pack_labels(tmp_path / "labels", NAMES, *random_labels(4), **facts)
    with pytest.raises(UserError, match=message):
        open_labels(folder, list(CLASSES))


def test_a_store_that_lost_its_end(store):
    os.truncate(store / "ids.i16", 100)
    with pytest.raises(UserError, match="damaged store of label maps .ids.i16 is shorter than the 256 bytes"):
        open_labels(store, list(CLASSES))


def test_a_published_map_that_runs_code_does_not(files, tmp_path):
    labels, proof = open_labels(files, list(CLASSES)), tmp_path / "proof"
    keys = labels.find(NAMES)
    torch.save(RunsCode(proof), files / f"{NAMES[1]}.pt")
    with pytest.raises(UserError, match="b.pt is no label map"):
        labels.read(keys)
    assert not proof.exists()


def test_published_maps_of_other_classes_are_told_at_once(files):
    with pytest.raises(UserError, match="a.pt holds the class id [12], but the set has 1 classes"):
        open_labels(files, ["n01440764"]).find(NAMES)


def test_folders_that_hold_no_maps(tmp_path, store):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=f"--relabel {folder} holds no label maps"):
            open_labels(folder, list(CLASSES))
    (store / "labels.json").write_text("{")
    with pytest.raises(UserError, match="is a damaged store"):
        open_labels(store, list(CLASSES))
    (store / "labels.json").write_text(json.dumps({"pictures": 4}))
    with pytest.raises(UserError, match="is a damaged store"):
        open_labels(store, list(CLASSES))


def test_maps_that_cannot_be_used(tmp_path, files):
    logits, ids = random_labels(4)
    folder = pack_labels(tmp_path / "ids", NAMES, logits, ids + 1)
    with pytest.raises(UserError, match="row 0 of .*ids holds the class id 3, but the set has 3"):
        open_labels(folder, list(CLASSES)).read([0, 1, 2])
    folder = pack_labels(tmp_path / "negative", NAMES, logits, ids - (np.arange(4) == 2)[:, None, None, None])
    with pytest.raises(UserError, match="row 2 of .*negative holds the class id -1, but"):
        open_labels(folder, list(CLASSES)).read(np.array([3, 1, 2]))
    logits[0, 0, 0, 0] = math.nan
    folder = pack_labels(tmp_path / "nan", NAMES, logits, ids)
    with pytest.raises(UserError, match="row 0 of .*nan holds logits that are not finite"):
        open_labels(folder, list(CLASSES)).read([0])

    labels = open_labels(files, list(CLASSES))
    keys = labels.find(NAMES)
    path = files / f"{NAMES[1]}.pt"
    for content, message in ((torch.zeros(2, 4, 4), r"b.pt is no label map .shape \(2, 4, 4\) instead of"),
                             (torch.zeros(2, 2, 3, 3), r"b.pt is no label map .shape \(2, 2, 3, 3\) instead of"),
                             (torch.full((2, 2, 4, 4), 9.0), "b.pt holds the class id 9, but the set has 3"),
                             ({"maps": 1}, "b.pt is no label map")):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            labels.read(keys)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="b.pt is no label map"):
        labels.read(keys)
    path.unlink()
    with pytest.raises(UserError, match="b.pt is no label map"):
        labels.read(keys)
