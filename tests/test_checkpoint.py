"""checkpoint.py: nothing is lost, damage is told, published files load, and no file runs code."""

import argparse
import errno
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import refiner_min
from refiner_min import UserError, checkpoint, explain, train
from refiner_min.model import RefinerConfig, RefinerViT, refiner_vit_l, refiner_vit_m, refiner_vit_s
from tests.runs import SMALL, small
from tests.test_model import TINY, golden

STATE = {"step": 1, "weights": torch.arange(1000.0)}


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def test_save_and_load(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    checkpoint.save(STATE | {"step": 2}, path, backup=True)
    assert checkpoint.load(path)["step"] == 2
    assert torch.equal(checkpoint.load(path)["weights"], STATE["weights"])
    assert checkpoint.load(checkpoint.backup_of(path))["step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.backup.pt", "last.pt"]


@pytest.mark.parametrize("damage", ["cut in half", "one bit", "emptied", "missing"])
def test_the_one_before_a_damaged_file_is_used(tmp_path, capsys, damage):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    checkpoint.save(STATE | {"step": 2}, path, backup=True)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[content.find(STATE["weights"].numpy().tobytes()) + 100] ^= 1
        path.write_bytes({"cut in half": content[: len(content) // 2], "one bit": content, "emptied": b""}[damage])
    assert checkpoint.load(path)["step"] == 1 and not (tmp_path / "last.damaged.pt").exists()
    assert checkpoint.load(path, set_aside=True)["step"] == 1
    if damage != "missing":
        assert (tmp_path / "last.damaged.pt").exists()  # and not where the next save would make it the backup
    said = capsys.readouterr().out
    assert "last.backup.pt" in said and ("missing" if damage == "missing" else "damaged") in said


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), PermissionError(errno.EACCES, "no right"),
                                   MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    """Else a run would go on from an older one, for a disk that was away for a moment."""
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    checkpoint.save(STATE | {"step": 2}, path, backup=True)

    def fail(*words, **more):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_torch", fail)
        with pytest.raises(UserError, match="last.pt cannot be read .(.Errno|MemoryError|CUDA out of memory)"):
            checkpoint.load(path, set_aside=True)
    assert checkpoint.load(path)["step"] == 2


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*last.pt"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_text("not weights")
    with pytest.raises(UserError, match="last.pt is damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"^\. is damaged or not a checkpoint .it is no file"):
        checkpoint.load(".")
    with pytest.raises(UserError, match=r"^\. could not be written"):
        checkpoint.save(STATE, ".")


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    code = ("import resource, sys, torch; from refiner_min import UserError, checkpoint\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"  # a file may not grow beyond that
            "try: checkpoint.save({'step': 2, 'weights': torch.zeros(10000)}, sys.argv[1], backup=True)\n"
            "except UserError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "last.pt could not be written (no larger file is allowed here)" in done.stdout, done.stderr
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_called_that(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    monkeypatch.setattr(refiner_min, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    for state in (STATE, {"weights": torch.zeros(10**6)}):  # told when the file is closed, or by torch on the way
        with pytest.raises(UserError, match="last.pt could not be written .the disk is full.; what was there before"):
            checkpoint.save(state, path, backup=True)
    assert checkpoint.load(path)["step"] == 1


def test_killed_between_the_renames(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    rename, calls = checkpoint.os.replace, []

    def die_at_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(STATE | {"step": 2}, path, backup=True)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_does_not(tmp_path, zipped):
    path, proof = tmp_path / "evil.pth.tar", tmp_path / "proof"
    torch.save({"state_dict": {}, "args": RunsCode(proof)}, path, _use_new_zipfile_serialization=zipped)
    for load in (checkpoint.load, lambda path: checkpoint.load_released(RefinerViT(RefinerConfig(**TINY)), path)):
        with pytest.raises(UserError, match="evil.pth.tar is damaged or not a checkpoint"):
            load(path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(RunsCode(proof)))
    with pytest.raises(UserError, match="evil.pt is damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not proof.exists()


def test_load_model(tmp_path):
    model = RefinerViT(RefinerConfig(**TINY))
    average = {name: value + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "last.pt"
    checkpoint.save({"config": asdict(model.config), "model": model.state_dict(), "ema": average}, path)
    loaded, state = checkpoint.load_model(path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded.class_token, model.class_token + 1)
    checkpoint.save({"config": asdict(model.config) | {"later": 1}, "model": {}}, path)
    with pytest.raises(UserError, match="last.pt was written by another version of refiner_min .*later"):
        checkpoint.load_model(path)
    checkpoint.save({"weights": 1}, path)
    with pytest.raises(UserError, match="not written by refiner_min.train, and is no published"):
        checkpoint.load_model(path)


def test_an_older_file_lacks_the_newest_fields_of_the_model(pictures):
    """They are as they were then; it is evaluated, trained on and explained."""
    assert train.main(small(pictures, "--out", "run")) == 0
    state = checkpoint.load("run/best.pt")
    del state["config"]["unrefined"], state["recipe"]["unrefined"]
    checkpoint.save(state, "old.pt")
    assert train.main(["--eval", "--weights", "old.pt", "--device", "cpu"]) == 0
    assert train.main(small(pictures, "--weights", "old.pt", "--out", "on")) == 0
    photo = next((pictures / "val").rglob("*.png"))
    assert explain.main([str(photo), "--weights", "old.pt", "--out", "out.png"]) == 0


def test_small_weights_come_with_the_package_and_go_by_name(pictures, tmp_path, monkeypatch, capsys):
    """Matrices and kernels in bf16; taken in the place of a path: evaluated, trained on, explained."""
    assert train.main(small(pictures, "--ema", "0.9", "--out", "run")) == 0
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    checkpoint.pack("run/last.pt", tmp_path / "ti.pt")
    packed, whole = checkpoint.load("ti"), checkpoint.load("run/last.pt")
    assert packed["classes"] == whole["classes"] and not {"optimizer", "model", "history"} & packed.keys()
    model = checkpoint.load_pretrained("ti")
    assert not model.training
    for name, value in whole["ema"].items():
        stored = value.bfloat16() if value.ndim > 1 else value
        assert packed["ema"][name].dtype == stored.dtype and torch.equal(packed["ema"][name], stored)
        assert torch.equal(model.state_dict()[name], stored.to(value.dtype))
    capsys.readouterr()
    assert train.main(["--eval", "--weights", "ti", "--device", "cpu"]) == 0
    right = round(whole["history"][-1]["val_accuracy"] * 12)
    assert f"({right} of 12)" in capsys.readouterr().out
    for name in ("other", "none"):  # a set of other classes: the heads are new
        for split in ("train", "val"):
            shutil.copytree(pictures / split / "n01440764", Path("own") / split / name)
    words = ["--subset", "folder", "--data", "own", *SMALL, "--epochs", "1", "--out", "mine"]
    assert train.main([*words, "--weights", "ti"]) == 0
    assert "weights of ti: their moving average; for other classes, so the heads are new" in capsys.readouterr().out
    photo = next((pictures / "val").rglob("*.png"))
    assert explain.main([str(photo), "--weights", "ti", "--out", "out.png"]) == 0
    with pytest.raises(UserError, match="s is none of the weights that come with the package: ti, plain-ti"):
        checkpoint.load_pretrained("s")
    Path("ti").write_bytes(Path("run/last.pt").read_bytes())  # a file of that name goes first
    assert "optimizer" in checkpoint.load("ti")


def test_which_weights_of_a_file():
    """Of ours the average where there is one; of a published file the raw ones, as the published code takes them."""
    raw, ema = torch.tensor(1), torch.tensor(2)
    ours = {"config": {}, "model": {"a": raw}, "ema": {"a": ema}}
    published = {"state_dict": {"module.cls_token": raw}, "state_dict_ema": {"module.cls_token": ema}}
    assert checkpoint.weights_of(ours) == checkpoint.weights_of(ours, "ema") == ({"a": ema}, "ema")
    assert checkpoint.weights_of(ours, "raw") == ({"a": raw}, "raw")
    assert checkpoint.weights_of(ours | {"ema": None}) == ({"a": raw}, "raw")
    known = {"class_token": raw}, "raw"
    assert checkpoint.weights_of(published) == checkpoint.weights_of(published, "raw") == known
    assert checkpoint.weights_of(published, "ema") == ({"class_token": ema}, "ema")
    assert checkpoint.weights_of({"cls_token": raw}) == known  # a file of weights alone
    for state, wanted in ((ours | {"ema": None}, "ema"), ({"config": {}, "ema": {}}, "raw"), ({"config": {}}, None),
                          ({"cls_token": raw}, "ema")):
        with pytest.raises(UserError, match=f"best.pt holds no {wanted or 'raw'} weights, only"):
            checkpoint.weights_of(state, wanted, "best.pt")


@pytest.mark.parametrize("overrides", [{}, dict(dense=False, depth=2), dict(share=False, expand=2), dict(expand=1),
                                       dict(kernel_size=5, mlp_ratio=2.0), dict(kernel_size=1, in_channels=1)], ids=str)
def test_a_published_model_is_known_by_its_shapes(overrides, tmp_path):
    model = RefinerViT(RefinerConfig(**TINY | overrides)).eval()
    torch.save({"state_dict": published_state(model)}, tmp_path / "published.pth.tar")
    found, _ = checkpoint.load_model(tmp_path / "published.pth.tar")
    assert found.config == model.config
    images = torch.randn(2, model.config.in_channels, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


@pytest.mark.parametrize("side", [24, 28])
def test_positions_are_enlarged_as_published(side):
    with np.load(Path(__file__).parent / "data" / "recipe.npz") as numbers:
        position, expected = (torch.from_numpy(numbers[f"position_{name}"]) for name in (14, side))
    torch.testing.assert_close(checkpoint._resize_position(position, side), expected, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Published weights


def published_name(ours: str) -> str:
    """The inverse of our_name, by exhaustion: the test's own, so that a wrong table shows."""
    for theirs, own in reversed(checkpoint.PUBLISHED_NAMES):
        ours = ours.replace(own, theirs)
    return ours


def published_state(model) -> dict:
    return {published_name(name): value for name, value in model.state_dict().items()}


def test_names_of_the_golden_file_are_all_known():
    """The published names come from the published code itself (tests/data), not from our table."""
    numbers = golden("refiner_tiny")
    names = {checkpoint.our_name(key.removeprefix("state/")) for key in numbers if key.startswith("state/")}
    assert names == RefinerViT(RefinerConfig(**TINY)).state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("build", [refiner_vit_s, refiner_vit_m, refiner_vit_l])
def test_published_files_load(tmp_path, build):
    """A file as the published training writes it, at 32 px, into a model at 48 px with 1000 classes."""
    torch.manual_seed(0)
    source = build(img_size=32)
    weights = {f"module.{name}": value for name, value in published_state(source).items()}
    file = {"arch": "Refiner_ViT", "epoch": 3, "args": argparse.Namespace(lr=5e-4, model="Refiner_ViT"),
            "state_dict": {name: torch.zeros_like(value) for name, value in weights.items()},
            "state_dict_ema": weights, "metric": 83.0}
    path = tmp_path / "published.pth.tar"
    torch.save(file, path)
    model = build(img_size=48)
    checkpoint.load_released(model, path)  # as the published code takes them
    assert not any(value.any() for value in model.state_dict().values())
    checkpoint.load_released(model, path, wanted="ema")
    for name, value in model.state_dict().items():
        if name != "position":
            assert torch.equal(value, source.state_dict()[name]), name
    assert torch.equal(model.position[:, 0], source.position[:, 0])
    assert model.position.shape == (1, 10, model.config.dim)
    assert model.position.std().item() == pytest.approx(source.position.std().item(), rel=0.5)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"state_dict_ema": w},
                                  lambda w: {f"module.{name}": value for name, value in w.items()}])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_of_published_files(tmp_path, wrap, zipped):
    source, model = RefinerViT(RefinerConfig(**TINY)), RefinerViT(RefinerConfig(**TINY))
    path = tmp_path / "published.pth.tar"
    torch.save(wrap(published_state(source)), path, _use_new_zipfile_serialization=zipped)
    checkpoint.load_released(model, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_released_numbers_are_those_of_the_published_code():
    numbers = golden("refiner_tiny")
    model = RefinerViT(RefinerConfig(**TINY)).eval()
    checkpoint.load_released(model, {key.removeprefix("state/"): value for key, value in numbers.items()
                                     if key.startswith("state/")})
    torch.testing.assert_close(model(numbers["input"]), numbers["eval_logits"].float(), atol=1e-5, rtol=0)


def test_positions_made_fewer_are_antialiased():
    position = torch.randn(1, 1 + 8 * 8, 6)
    found = checkpoint._resize_position(position, 3)
    patches = position[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, (3, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(found[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2), expected)


def test_positions_of_a_linear_ramp_stay_one():
    """Resizing keeps where things are: a ramp over the columns stays a ramp over the columns."""
    ramp = torch.arange(4.0).repeat(4).reshape(1, 16, 1)
    resized = checkpoint._resize_position(torch.cat([torch.full((1, 1, 1), 9.0), ramp], dim=1), 8)
    grid = resized[0, 1:, 0].unflatten(0, (8, 8))
    assert resized[0, 0, 0] == 9
    assert torch.allclose(grid[0], grid[-1], atol=1e-5) and (grid[0].diff() > 0).all()


def test_what_does_not_fit_is_named(tmp_path):
    model = RefinerViT(RefinerConfig(**TINY))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = published_state(RefinerViT(RefinerConfig(**TINY | dict(num_classes=5))))
    weights.pop("blocks.0.mlp.scale_channel")  # as in the first published version
    weights["extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        checkpoint.load_released(model, weights)
    for fault in ("missing: blocks.0.mlp.scale", "unknown: extra", "head.weight: (5, 24) in the file, (7, 24) in"):
        assert fault in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_can_be_left_out():
    source = RefinerViT(RefinerConfig(**TINY | dict(num_classes=5)))
    model = RefinerViT(RefinerConfig(**TINY))
    head = model.head.weight.clone()
    checkpoint.load_released(model, published_state(source), classifier=False)
    assert torch.equal(model.head.weight, head) and torch.equal(model.norm.weight, source.norm.weight)
    assert torch.equal(model.blocks[0].attention.qkv.weight, source.blocks[0].attention.qkv.weight)


def test_a_model_without_token_head_takes_the_rest():
    source, model = RefinerViT(RefinerConfig(**TINY)), RefinerViT(RefinerConfig(**TINY | dict(dense=False)))
    checkpoint.load_released(model, published_state(source))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        checkpoint.load_released(RefinerViT(RefinerConfig(**TINY)), tmp_path / "none.pth.tar")
