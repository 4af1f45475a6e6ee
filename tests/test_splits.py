"""splits.py: decoded once and cached, or streamed alike by any number of workers; pictures with their label maps."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_min import UserError, data, splits
from refiner_min.augment import StreamAugmentation
from refiner_min.label_store import LabelMap
from tests.pictures import CLASSES, make_folder, names_of, pack_labels, random_labels
from tests.runs import small

# ----------------------------------------------------------------------------------------------------------------------
# Decoded


def test_folder_is_decoded_and_cached(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", size=(60, 30))
    subset = data.load_subset("folder", str(root), 16)
    assert subset.classes == list(CLASSES) and subset.class_names == ["tench", "English springer", "cassette player"]
    assert subset.train.pictures.shape == (18, 3, 20, 20) and len(subset.val) == 9
    assert subset.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert (subset.train.aspects == 2).all()

    monkeypatch.setattr(splits, "read_picture", lambda path: pytest.fail("the cache was not used"))
    again = data.load_subset("folder", str(root), 16)
    assert torch.equal(again.train.pictures, subset.train.pictures) and torch.equal(again.val.labels, subset.val.labels)
    monkeypatch.undo()

    cache = root / "refiner_min-train-20px.pt"
    cache.write_bytes(cache.read_bytes()[:1000])  # a damaged cache is made again
    assert torch.equal(data.load_subset("folder", str(root), 16).train.pictures, subset.train.pictures)
    Image.new("RGB", (30, 30)).save(root / "train" / CLASSES[0] / "new.png")  # so is one of other pictures
    assert len(data.load_subset("folder", str(root), 16).train) == 19


def test_a_picture_replaced_by_one_of_the_same_size_is_decoded_again(tmp_path):
    root = make_folder(tmp_path / "set")
    path = root / "train" / CLASSES[0] / "0.bmp"
    Image.new("RGB", (8, 8), (10, 10, 10)).save(path)
    size = path.stat().st_size
    assert (data.load_subset("folder", str(root), 16).train.pictures[0] == 10).all()
    Image.new("RGB", (8, 8), (99, 99, 99)).save(path)
    os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    assert path.stat().st_size == size
    assert (data.load_subset("folder", str(root), 16).train.pictures[0] == 99).all()


@pytest.mark.parametrize("spoil", [
    lambda state: state["split"][0].view(-1)[:1].add_(1) and None,
    lambda state: {"key": state["key"], "split": state["split"][:2]},
    lambda state: {"key": state["key"], "split": (state["split"][0][:, :1], *state["split"][1:])},
    lambda state: {"key": state["key"], "split": (state["split"][0].float(), *state["split"][1:])},
    lambda state: {"key": state["key"], "split": (*state["split"][:2], state["split"][2][:5], state["split"][3])},
    lambda state: [1, 2, 3], lambda state: {"key": state["key"], "split": None},
], ids=["other pixels", "parts", "channels", "floats", "labels", "list", "none"])
def test_a_cache_with_other_content_is_made_again(tmp_path, spoil):
    """A flipped byte fails the file's checksum; content of another shape does not fit, whatever its key."""
    root = make_folder(tmp_path / "set")
    whole, cache = data.load_subset("folder", str(root), 16).train, root / "refiner_min-train-20px.pt"
    content, state = cache.read_bytes(), torch.load(cache, weights_only=True)
    spoilt = spoil(state)
    if spoilt is None:
        place = content.index(whole.pictures.numpy().tobytes()[:200])
        cache.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    else:
        torch.save(spoilt, cache)
    again = data.load_subset("folder", str(root), 16).train
    assert torch.equal(again.pictures, whole.pictures) and torch.equal(again.labels, whole.labels)


def test_links_pipes_and_names_of_any_bytes_among_the_pictures(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    folder = root / "train" / CLASSES[0]
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    Image.new("RGB", (8, 8), (50, 50, 50)).save(odd)
    for _ in range(2):  # decoded, then from the cache
        assert len(data.load_subset("folder", str(root), 16).train) == 19
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UserError, match="broken.png is not a picture .*no file, or a broken link"):
        data.load_subset("folder", str(root), 16)
    assert len(data.load_subset("folder", str(root), 16, skip_bad=True).train) == 19
    assert "left out 3 of 22 in train" in capsys.readouterr().out
    stream = data.load_subset("folder", str(root), 16, skip_bad=True, storage="stream", workers=0).train
    assert sum(len(batch.labels) for batch in stream.epoch(torch.arange(len(stream)), 22)) == 19
    capsys.readouterr()


def test_of_two_that_need_it_one_decodes(tmp_path, monkeypatch):
    """The other waits, and finds the cache; as processes of several machines do on one disk."""
    root, decoded, found = make_folder(tmp_path / "set"), [], []
    decode = splits._decode

    def slowly(listing, *words):
        decoded.append(listing.root.name)
        time.sleep(0.3)
        return decode(listing, *words)

    monkeypatch.setattr(splits, "_decode", slowly)
    threads = [threading.Thread(target=lambda: found.append(data.load_subset("folder", str(root), 16)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(decoded) == ["train", "val"] and not list(root.glob("*.lock"))
    assert torch.equal(found[0].train.pictures, found[1].train.pictures)


def test_what_cannot_be_cached_is_still_read(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "set")

    def refuse(*paths):
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(data.load_subset("folder", str(root), 16).train) == 18
    assert "not cached" in capsys.readouterr().out
    assert sorted(file.name for file in root.iterdir()) == ["train", "val"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_picture_stops_or_is_skipped(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    truncate(root / "train" / CLASSES[1] / "3.png")
    with pytest.raises(UserError, match=r"train.n02102040.3.png is not a picture that can be read .*--skip-bad"):
        data.load_subset("folder", str(root), 16)
    subset = data.load_subset("folder", str(root), 16, skip_bad=True)
    assert subset.train.labels.bincount().tolist() == [6, 5, 6]
    assert "left out 1 of 18 in train: " in capsys.readouterr().out
    for file in (root / "train" / CLASSES[1]).iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no readable picture in .*train for n02102040"):
        data.load_subset("folder", str(root), 16, skip_bad=True)


# ----------------------------------------------------------------------------------------------------------------------
# Streamed


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A folder that is too large for the memory it may take."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1000)
    return make_folder(tmp_path / "set")


def batches(split, epoch=0, count=18):
    return [[tensor.clone() for tensor in batch[:3]] for batch in split.epoch(torch.arange(count), 4, epoch)]


def test_a_stream_depends_on_seed_and_epoch_not_on_workers(streamed):
    def stream(workers, seed=0):
        return data.load_subset("folder", str(streamed), 16, workers=workers, seed=seed,
                                transform=StreamAugmentation(16, magnitude=9)).train

    first = batches(stream(0))
    assert [len(labels) for _, _, labels in first] == [4, 4, 4, 4, 2]
    assert first[0][0].shape == (4, 3, 16, 16) and first[0][0].dtype == torch.uint8
    for one, two in zip(first, batches(stream(2))):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(first[0][0], batches(stream(0), epoch=1)[0][0])
    assert not torch.equal(first[0][0], batches(stream(0, seed=1))[0][0])
    state = torch.get_rng_state()
    batches(stream(0))
    assert torch.equal(torch.get_rng_state(), state)  # the workers' chance is not training's


def test_a_stream_decodes_no_more_of_a_photograph_than_its_crop_needs(tmp_path):
    """The same crop of it; with maps, which are changed before the crop, and in validation all of it is decoded."""
    root = make_folder(tmp_path / "set")
    names = names_of(root)
    for path in sorted(root.rglob("*.png")):
        picture = Image.open(path).resize((640, 480), Image.Resampling.BICUBIC)
        path.unlink()
        picture.save(path.with_suffix(".jpg"), quality=95)
    store = pack_labels(tmp_path / "labels", names, *random_labels(18))

    def first(draft, **options):
        still = StreamAugmentation(16, flip=0.0, magnitude=0, draft=draft)
        subset = data.load_subset("folder", str(root), 16, storage="stream", transform=still, **options)
        return next(subset.train.epoch(torch.arange(18), 18)).pictures.float(), \
            next(subset.val.epoch(torch.arange(9), 9)).pictures

    (drafted, val), (whole, whole_val) = first(True), first(False)
    assert 0 < (drafted - whole).abs().mean() < 2 and torch.equal(val, whole_val)
    assert torch.equal(first(True, labels=str(store))[0], first(False, labels=str(store))[0])


def test_a_streamed_validation_is_cropped_in_the_middle(streamed):
    split = data.load_subset("folder", str(streamed), 16, eval_crop=0.8).val
    pictures, aspects, labels, *_ = next(split.epoch(torch.arange(2), 2))
    with Image.open(streamed / "val" / CLASSES[0] / "0.png") as picture:  # 40 x 30: the shorter side becomes 20
        resized = picture.resize((26, 20), Image.Resampling.BICUBIC)
        expected = np.asarray(resized.crop((5, 2, 21, 18)))
    assert np.abs(pictures[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert labels.tolist() == [0, 0] and (aspects == 1).all()


def test_moving_a_split_leaves_it_where_it_was(streamed, monkeypatch):
    stream = data.load_subset("folder", str(streamed), 16).train
    moved = stream.to("meta")
    assert next(moved.epoch(torch.arange(4), 4)).pictures.is_meta
    assert not next(stream.epoch(torch.arange(4), 4)).pictures.is_meta
    monkeypatch.undo()
    decoded = data.load_subset("folder", str(streamed), 16).train
    assert decoded.to("meta").pictures.is_meta and not decoded.pictures.is_meta
    scenes = data.load_subset("digit-scenes", None, 16).train
    assert scenes.to("meta").images.is_meta and not scenes.images.is_meta


def test_training_keeps_its_workers_and_validation_does_not(streamed):
    subset = data.load_subset("folder", str(streamed), 16, workers=1)
    for split in (subset.train, subset.val):
        batches(split, count=9)
    assert subset.train.loader._iterator is not None and subset.val.loader._iterator is None


@pytest.mark.slow
def test_workers_of_a_stream_that_is_still_held_end_with_python(streamed):
    """An error that somebody keeps, as pytest keeps those of failed tests, holds the stream and its workers."""
    code = ("import sys, torch\nfrom refiner_min import data\n"
            "subset = data.load_subset('folder', sys.argv[1], 16, storage='stream', workers=2)\n"
            "kept = [split.epoch(torch.arange(9), 4) for split in (subset.train, subset.val)]\n"
            "print(*(len(next(batches).labels) for batches in kept))")
    done = subprocess.run([sys.executable, "-c", code, streamed], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 4\n", "")


@pytest.mark.slow
def test_a_reader_that_is_killed_ends_the_run_with_a_sentence(pictures):
    command = [sys.executable, "-u", "-m", "refiner_min.train", *small(
        pictures, "--storage", "stream", "--workers", "2", "--epochs", "4000", "--batch-size", "4")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("runs/folder/best.pt").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    readers = [child for child in children if b"refiner_min.train" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(int(readers[0]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "error: a process that reads pictures has ended (DataLoader worker" in said
    assert "Traceback" not in said
    assert not [reader for reader in readers if Path(f"/proc/{reader}").exists()]


def test_a_disk_that_does_not_answer_is_told(streamed, monkeypatch):
    monkeypatch.setattr(splits, "WAIT", 1)
    subset = data.load_subset("folder", str(streamed), 16, workers=1, transform=lambda picture: time.sleep(30))
    with pytest.raises(UserError, match="no picture was read for 0.0166667 minutes: does the disk answer?"):
        with splits.readers_told():
            list(subset.train.epoch(torch.arange(4), 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_stops_a_stream_or_is_skipped(streamed, capsys, workers):
    truncate(streamed / "train" / CLASSES[0] / "1.png")
    with pytest.raises(UserError, match=r"1.png is not a picture that can be read"):
        batches(data.load_subset("folder", str(streamed), 16, workers=workers).train)
    found = batches(data.load_subset("folder", str(streamed), 16, workers=workers, skip_bad=True).train)
    assert [len(labels) for _, _, labels in found] == [3, 4, 4, 4, 2]
    assert "left out, 1 so far: " in capsys.readouterr().out
    for number in range(4):
        (streamed / "train" / CLASSES[0] / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture of a whole batch could be read"):
        batches(data.load_subset("folder", str(streamed), 16, workers=workers, skip_bad=True).train)


# ----------------------------------------------------------------------------------------------------------------------
# With label maps


def test_label_maps_come_with_their_pictures(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", size=(60, 30))
    names = names_of(root)
    logits, ids = random_labels(18)
    shuffled = np.random.default_rng(1).permutation(18)  # a store's rows are in an order of its own
    store = pack_labels(tmp_path / "labels", [names[row] for row in shuffled], logits[shuffled], ids[shuffled])
    for limit in (data.MEMORY_LIMIT, 1000):
        monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
        for workers in (0, 2):
            still = StreamAugmentation(16, (1.0, 1.0), flip=0.0, magnitude=0)
            subset = data.load_subset("folder", str(root), 16, labels=str(store), transform=still, workers=workers)
            assert isinstance(subset.train, splits.StreamSplit if limit == 1000 else splits.MemorySplit)
            assert (subset.relabel, subset.annotator) == (str(store), "hand at 64 px")
            indices = torch.tensor([4, 17, 0, 9, 2])
            found = list(subset.train.epoch(indices, 3))
            for batch, here in zip(found, indices.split(3)):
                assert batch.labels.tolist() == [int(index) // 6 for index in here]
                assert torch.equal(batch.label_map.logits, torch.from_numpy(logits[here]).float())
                assert torch.equal(batch.label_map.ids, torch.from_numpy(ids[here]))
                assert batch.boxes is None if limit != 1000 else batch.boxes.shape == (len(here), 4)
            assert next(subset.val.epoch(torch.arange(2), 2)).label_map is None


def test_maps_are_read_while_the_batch_before_is_trained_on():
    logits, ids = torch.zeros(6, 1, 2, 2), torch.arange(24).view(6, 1, 2, 2)
    asked, went_on = [], threading.Event()

    class Store:
        def read(self, keys):
            asked.append(keys.tolist())
            if len(asked) == 2:
                went_on.set()
            return LabelMap(logits[keys], ids[keys])

    split = splits.MemorySplit(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.ones(6), torch.zeros(6).long(),
                               maps=splits.PictureMaps(Store(), np.arange(6)))
    batches = split.epoch(torch.tensor([5, 0, 3, 1]), 2)
    first = next(batches)
    assert went_on.wait(10)  # without being asked for the second batch
    assert torch.equal(first.label_map.ids, ids[[5, 0]])
    assert torch.equal(next(batches).label_map.ids, ids[[3, 1]])
    assert next(batches, None) is None and asked == [[5, 0], [3, 1]]


def test_a_stream_with_maps_depends_on_seed_and_epoch_not_on_workers(streamed):
    store = pack_labels(streamed.parent / "labels", names_of(streamed), *random_labels(18))

    def first(workers, seed=0, epoch=0):
        split = data.load_subset("folder", str(streamed), 16, labels=str(store), workers=workers, seed=seed).train
        batch = next(split.epoch(torch.arange(4), 4, epoch))
        return [batch.pictures, *batch.label_map, batch.boxes]

    for one, two in zip(first(0), first(2)):
        assert torch.equal(one, two)
    assert not torch.equal(first(0)[3], first(0, seed=1)[3]) and not torch.equal(first(0)[3], first(0, epoch=1)[3])


def test_a_picture_without_a_map_stops_before_anything_is_read(tmp_path, streamed):
    store = pack_labels(tmp_path / "labels", names_of(streamed)[:-2], *random_labels(16))
    with pytest.raises(UserError, match="has no map for 2 of the 18 training pictures"):
        data.load_subset("folder", str(streamed), 16, labels=str(store))
    with pytest.raises(UserError, match="--relabel there does not go with --subset digits"):
        data.load_subset("digits", None, 16, labels="there")


def test_what_the_annotator_left_out_is_left_out_of_a_stream(tmp_path, streamed):
    names = names_of(streamed)
    store = pack_labels(tmp_path / "labels", names, *random_labels(18), skipped=[names[3]])
    with pytest.raises(UserError, match=f"has no map for 1 of the 18 training pictures, {names[3]}"):
        data.load_subset("folder", str(streamed), 16, labels=str(store))
    split = data.load_subset("folder", str(streamed), 16, labels=str(store), skip_bad=True).train
    assert len(split) == 17
    batch = next(split.epoch(torch.tensor([2, 3]), 2))
    assert batch.labels.tolist() == [0, 0] and len(batch.label_map.ids) == 2


def test_a_bad_map_of_a_stream_is_named(streamed):
    for name in names_of(streamed):
        path = streamed.parent / "maps" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.zeros(2, 2, 4, 4), path)
    torch.save(torch.full((2, 2, 4, 4), 7.0), path)
    for workers in (0, 1):
        for skip_bad in (False, True):  # a bad map is not a bad picture
            split = data.load_subset("folder", str(streamed), 16, labels=str(path.parents[1]), workers=workers,
                                     skip_bad=skip_bad).train
            with pytest.raises(UserError, match=r"5.pt holds the class id 7, but the set has 3 classes$"):
                list(split.epoch(torch.arange(18), 4))
