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
        os.truncate(file, 50_000 * 2 * 32 * 32 * 2)  # sparse
    facts = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(facts | {"shape": [2, 32, 32], "done": 50_000}))
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


@pytest.mark.parametrize("kind, twins", [("store", ["b", "b"]), ("files", ["b.1", "b.2"])])
def test_no_two_pictures_learn_from_one_map(kind, twins, request):
    """b.png was added beside b.jpg, or the published stems are the same."""
    labels = open_labels(request.getfixturevalue(kind), list(CLASSES))
    with pytest.raises(UserError, match="has one map for 2 training pictures that are called n01440764/b: rename"):
        labels.find([NAMES[0], *(f"n01440764/{name}" for name in twins)])


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


@pytest.mark.parametrize("facts", [
    dict(shape=value) for value in (
        None, 5, [2, 4], [2, 4, 4, 1], [0, 3, 3], [2, 0, 0], [2, -4, -4], [[2], 4, 4], [2.0, 4, 4], [True, 4, 4],
        [10**40, 4, 4], [2, 8, 2], [8, 2, 2], [1, 1, 1], [2, 3, 3])] + [
    dict(classes=value) for value in (None, 3, "n01440764", [1, 2, 3], {}, [None])] + [
    dict(done=value) for value in (None, -1, 5, "4", 4.0, 10**30, [4])] + [
    dict(skipped=value) for value in (None, "n01440764/a", [1], [["n01440764/a"]], ["n01440764/elsewhere"])] + [
    dict(made=value) for value in (None, "bf16", [1], [{}], [{"from": 0}], [{"from": "0", "how": "bf16"}])] + [
    dict(annotator=value) for value in (None, 1, ["hand"])] + [dict(size=value) for value in (None, "64", -1.5, [])],
    ids=str)
def test_facts_of_another_form_are_told(store, facts):
    path = store / "labels.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(UserError, match="labels is a damaged store of label maps"):
        open_labels(store, list(CLASSES))


@pytest.mark.parametrize("content", [
    "null", "[]", "5", '"labels"', "", "[" * 100_000, '{"done": NaN}', f'{{"done": {"9" * 5000}}}', "\x00", "\ufeff{}"],
    ids=range(10))
def test_json_that_holds_no_facts_is_told(store, content):
    (store / "labels.json").write_text(content)
    with pytest.raises(UserError, match="labels is a damaged store of label maps"):
        open_labels(store, list(CLASSES))
    (store / "labels.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="labels is a damaged store of label maps"):
        open_labels(store, list(CLASSES))


@pytest.mark.parametrize("names", [NAMES[:3], [*NAMES, "n01440764/more"], [NAMES[0], *NAMES[:3]], []], ids=str)
def test_names_that_do_not_go_with_the_facts_are_told(store, names):
    (store / "pictures.txt").write_text("".join(f"{name}\n" for name in names))
    with pytest.raises(UserError, match="is a damaged store|is not complete"):
        open_labels(store, list(CLASSES))


def test_maps_that_are_read_with_another_ones_shape_are_told_at_once(tmp_path):
    """4 x 4 x 4 bytes are as many as 1 x 8 x 8: the file's size fits, and its numbers do not."""
    classes = [*CLASSES, "n03000684"]
    folder = pack_labels(tmp_path / "labels", NAMES, *random_labels(4, num_classes=4, grid=8, top=1), classes=classes,
                         shape=[4, 4, 4])
    with pytest.raises(UserError, match="row 0 of .*labels, or one beside it, holds logits that are not the largest"):
        open_labels(folder, classes).find(NAMES)


@pytest.mark.filterwarnings("ignore")  # of torch, on sparse and quantized tensors
@pytest.mark.parametrize("make, message", [
    (lambda: torch.zeros(2, 2, 4, 4).to_sparse(), "no tensor of plain numbers"),
    (lambda: torch.quantize_per_tensor(torch.zeros(2, 2, 4, 4), 0.1, 0, torch.qint8), "no tensor of plain numbers"),
    (lambda: torch.zeros(2, 2, 4, 4, dtype=torch.complex64), "no tensor of plain numbers"),
    (lambda: torch.empty(2, 2, 4, 4, device="meta"), "no tensor of plain numbers"),
    (lambda: torch.zeros(1, 1, 1, 1).expand(2, 5, 30000, 30000), "a tensor that is larger than the file"),
    (lambda: [torch.zeros(2, 2, 4, 4)], "a list instead of a tensor"), (lambda: {}, "a dict instead of a tensor"),
    (lambda: "maps", "a str instead"), (lambda: None, "a NoneType instead"), (lambda: torch.zeros(2, 0, 4, 4), "shape"),
    (lambda: torch.tensor(1.0), r"shape \(\) instead of"), (lambda: torch.full((2, 2, 4, 4), 0.5), "no whole numbers"),
    (lambda: torch.full((2, 2, 4, 4), torch.nan), "no whole numbers"),
    (lambda: torch.full((2, 2, 4, 4), torch.inf), "holds the class id"),
], ids=range(14))
def test_published_maps_that_are_none_are_told(files, make, message):
    torch.save(make(), files / f"{NAMES[0]}.pt")
    with pytest.raises(UserError, match=f"a.pt (is no label map )?.?.*{message}"):
        open_labels(files, list(CLASSES)).find(NAMES)


def test_a_store_that_lost_its_end(store):
    os.truncate(store / "ids.i16", 100)
    with pytest.raises(UserError, match="damaged store of label maps .ids.i16 is shorter than the 256 bytes"):
        open_labels(store, list(CLASSES))
    os.truncate(store / "ids.i16", 300)
    with pytest.raises(UserError, match="damaged store of label maps .ids.i16 is longer than the 256 bytes"):
        open_labels(store, list(CLASSES))


@pytest.mark.parametrize("name", ["labels.json", "pictures.txt", "logits.f16", "ids.i16"])
def test_a_folder_or_a_broken_link_in_the_place_of_a_file(store, name):
    (store / name).unlink()
    (store / name).symlink_to(store / "nowhere")
    with pytest.raises(UserError, match="is a damaged store|holds no label maps"):
        open_labels(store, list(CLASSES))
    (store / name).unlink()
    (store / name).mkdir()
    with pytest.raises(UserError, match="is a damaged store"):
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
