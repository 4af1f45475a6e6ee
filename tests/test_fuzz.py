"""What reads foreign bytes gives a result or the project's own error, whatever the bytes: it runs no code of a file's,
takes no more memory than is right, and comes to an end. hypothesis makes the bytes, the same in every run.

200 cases a test; FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py for more.
"""

import argparse
import io
import json
import os
import random
import resource
import sys
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from refiner_min import UserError, checkpoint, train
from refiner_min.label_store import open_labels
from refiner_min.model import RefinerConfig, RefinerViT
from refiner_min.pictures import read_picture
from tests.pictures import CLASSES, pack_labels, random_labels
from tests.runs import CPU, small
from tests.test_checkpoint import RunsCode, published_state
from tests.test_foreign import replaced
from tests.test_label_store import NAMES
from tests.test_model import TINY

fuzzed = settings(max_examples=int(os.environ.get("FUZZ_CASES", 200)), deadline=timedelta(seconds=30), database=None,
                  derandomize=True, suppress_health_check=list(HealthCheck))
PROOF = Path("proof")  # what a file's code would make


@pytest.fixture(autouse=True)
def nothing_runs_and_memory_is_bounded():
    """A gigabyte above what the process had before is what no test here comes near."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(action="ignore"):  # torch's and Pillow's, of what they find in a file
        yield
    assert not PROOF.exists()
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def result_or_user_error(read, *words):
    try:
        return read(*words)
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return None


# ----------------------------------------------------------------------------------------------------------------------
# What is fed


edits = st.lists(st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "double"]), st.integers(0, 2**30),
                           st.sampled_from([1, 2, 4, 8, 64, 10**6]), st.binary(min_size=1, max_size=8)), min_size=1,
                 max_size=6)  # kind, where, how much, what


def edited(content: bytes, changes: list) -> bytes:
    content = bytearray(content)
    for kind, where, length, value in changes:
        start = where % (len(content) + 1)
        if kind == "flip" and content:
            content[where % len(content)] ^= 1 << value[0] % 8
        elif kind == "set":
            content[start:start + len(value)] = bytes([value[0] // 85 * 127 & 255]) * len(value)
        elif kind == "cut":
            del content[start:start + length]
        elif kind == "insert":
            content[start:start] = value
        elif kind == "double":
            content[start:start] = content[start:start + min(length, 64)]
    return bytes(content)


def edited_pickle(content: bytes, changes: list) -> bytes:
    """A file of torch.save with another pickle in it and the right checksums, so that these tell nothing."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return edited(content[:4000], changes) + content[4000:]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w") as target:
        for part in source.infolist():
            data = source.read(part)
            target.writestr(part.filename, edited(data, changes) if part.filename.endswith("data.pkl") else data)
    return file.getvalue()


def saved(value, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@st.composite
def tensors(draw):
    """Of any shape, format and layout, expanded ones included."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 24, 10**6]), max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8,
                                  torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]))
    value = torch.ones(1).mul(draw(st.sampled_from([0.0, 1.0, -1.0, 3e38, torch.inf, torch.nan]))).to(dtype)
    try:
        value = value.expand(shape)
        layout = draw(st.sampled_from(["expanded", "dense", "sparse", "quantized", "meta", "transposed", "parameter"]))
        if layout == "meta":
            return torch.empty(shape, device="meta", dtype=dtype)
        if value.numel() > 10**5 or layout == "expanded":
            return value
        value = value.clone()
        return {"dense": lambda: value, "sparse": value.to_sparse, "transposed": lambda: value.mT,
                "parameter": lambda: torch.nn.Parameter(value, requires_grad=value.is_floating_point()),
                "quantized": lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)}[layout]()
    except RuntimeError:  # no such tensor
        return value


numbers = st.sampled_from([0, 1, -1, 2, 5, 2**31, 2**63, -2**63, 10**30, 0.5, -0.0, 1e-308, 1e308, float("inf"),
                           float("nan"), True, False])
words = st.sampled_from(["", "memory", "digits", "ti", "\0", "x" * 1000]) | st.text(max_size=5)
leaves = st.one_of(numbers, st.none(), words)
facts = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                        max_size=3), max_leaves=5)
values = st.one_of(facts, tensors(), st.just(KeyError), st.just(RunsCode(PROOF)), st.tuples(leaves, tensors()),
                   st.dictionaries(st.one_of(st.integers(-1, 3), st.text(max_size=3)), tensors(), max_size=2))


@st.composite
def places(draw, state: dict):
    """Where in nested dicts: the keys that lead there, or to what is not there yet."""
    where = []
    while isinstance(state, dict):
        keys = sorted(state, key=str)
        where.append(draw(st.sampled_from([*keys, "new", 7]) if keys else st.just("new")))
        state = state.get(where[-1])
        if draw(st.integers(0, 4)) == 0:
            break
    return tuple(where)


def changes(state: dict, others=values):
    """Other values for one to three places."""
    return st.lists(st.tuples(places(state), others), min_size=1, max_size=3)


def changed(state: dict, others: list):
    """The state with them."""
    for where, value in others:
        with suppress(TypeError, AttributeError, KeyError):  # the place is gone
            state = replaced(state, where, value)
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def model():
    return RefinerViT(RefinerConfig(**TINY))


@pytest.fixture(scope="module")
def state(model):
    return {"config": asdict(model.config), "model": model.state_dict(), "ema": None}


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The state of a small run, with an average."""
    folder, flags = tmp_path_factory.mktemp("fuzz") / "run", ["--dim", "8", "--depth", "2", "--heads", "2"]
    assert train.main(small(pictures, "--epochs", "1", "--ema", "0.9", "--out", str(folder), *flags)) == 0
    return checkpoint.load(folder / "last.pt")


def test_checkpoints_of_any_bytes(model, state):
    published = {"state_dict": published_state(model)}
    files = [saved(state), saved(state, zipped=False), saved(published), saved(published, zipped=False)]

    @fuzzed
    @given(st.sampled_from(range(4)), st.sampled_from([edited, edited_pickle]), edits)
    def run(chosen, edit, changes):
        Path("weights.pt").write_bytes(edit(files[chosen], changes))
        for read in (checkpoint.load, checkpoint.load_model, lambda path: checkpoint.load_released(model, path)):
            result_or_user_error(read, "weights.pt")

    run()


def test_checkpoints_of_any_content(model, state):
    published = published_state(model)
    kinds = {"ours": state, "published": {"state_dict": published}, "weights": published}

    @fuzzed
    @given(st.sampled_from(sorted(kinds)).flatmap(lambda kind: st.tuples(st.just(kind), changes(kinds[kind]))))
    def run(drawn):
        kind, others = drawn
        Path("weights.pt").write_bytes(saved(changed(kinds[kind], others)))
        for read in (checkpoint.load_model, lambda path: checkpoint.load_released(model, path)):
            result_or_user_error(read, "weights.pt")

    run()


def test_runs_go_on_from_any_content_or_say_why_not(trained):
    """And what they go on from, they train."""
    args, _ = train.parse(["--resume", "last.pt", "--device", "cpu"])

    @fuzzed
    @given(changes(trained))
    def run(others):
        Path("last.pt").write_bytes(saved(changed(trained, others)))
        again = result_or_user_error(train.resumed_run, argparse.Namespace(**vars(args)), {}, CPU)
        if again is not None:
            again.train_batch(next(again.subset.train.epoch(again.order(0), again.local_batch)))

    run()


def test_a_checkpoint_cut_or_flipped_anywhere_is_never_taken_for_whole(trained):
    """100 cuts and 100 flipped bits: the file before it is gone on with, or the content is what was saved."""
    choose, whole = random.Random(0), saved(trained)
    Path("last.pt").write_bytes(whole)
    content_of_whole = saved(checkpoint.load("last.pt"))
    Path("last.backup.pt").write_bytes(saved(trained | {"step": 1}))
    for number in range(200):
        content = bytearray(whole)
        if number < 100:
            del content[choose.randrange(len(whole)):]
        else:
            content[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        Path("last.pt").write_bytes(content)
        found = checkpoint.load("last.pt")
        if found["step"] == 2:  # a bit of a zip file that no content is in
            assert number >= 100
            assert saved(found) == content_of_whole


# ----------------------------------------------------------------------------------------------------------------------
# Label maps


def read_maps(folder):
    labels = open_labels(folder, list(CLASSES))
    return labels.read(labels.find(NAMES))


def test_packed_maps_of_any_bytes():
    folder = pack_labels(Path("labels"), NAMES, *random_labels(4))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    description = json.loads(whole[folder / "labels.json"])
    places_changed = changes(description, st.just(KeyError) | facts)
    texts = st.one_of(facts, places_changed.map(lambda others: changed(description, others)))

    @fuzzed
    @given(st.sampled_from(sorted(whole)), edits, st.none() | texts)
    def run(chosen, changes, text):
        for path, content in whole.items():
            path.write_bytes(content)
        if text is None:
            chosen.write_bytes(edited(whole[chosen], changes))
        else:
            (folder / "labels.json").write_text(json.dumps(text))
        result_or_user_error(read_maps, folder)

    run()


def test_published_maps_of_any_bytes_and_content():
    logits, ids = random_labels(4)
    folder, maps = Path("files"), torch.from_numpy(np.stack([logits, ids.astype(np.float16)], axis=1))
    for name, planes in zip(NAMES, maps):
        path = folder / f"{name.split('.')[0]}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(planes.clone(), path)
    files = [saved(maps[0].clone(), zipped) for zipped in (True, False)]

    @fuzzed
    @given(st.sampled_from(files), st.sampled_from([edited, edited_pickle]), edits, st.just(KeyError) | values)
    def run(file, edit, changes, value):
        content = edit(file, changes) if value is KeyError else saved(value)
        (folder / f"{NAMES[0]}.pt").write_bytes(content)
        result_or_user_error(read_maps, folder)

    run()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_of_any_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8))
    files = []
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        for mode in ("RGB", "L", "P", "I;16"):
            file = io.BytesIO()
            try:
                (noise if mode == "RGB" else noise.convert("L").convert(mode)).save(file, kind)
            except (OSError, ValueError):  # not in this format
                continue
            files.append(file.getvalue())
    assert len(files) > 18

    @fuzzed
    @given(st.sampled_from(files), edits, st.sampled_from(["RGB", "L"]))
    def run(file, changes, mode):
        Path("picture.jpg").write_bytes(edited(file, changes))
        picture = result_or_user_error(read_picture, "picture.jpg", mode)
        assert picture is None or picture.mode == mode

    run()
