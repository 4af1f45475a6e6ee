"""train.py: every flag, every refusal, whole runs, and runs that go on as if they had never stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from refiner_min import UserError, checkpoint, compiling, data, engine, scenes, train
from refiner_min.augment import evaluation_picture, normalise
from refiner_min.model import refiner_vit_m, refiner_vit_s
from refiner_min.pictures import read_picture
from tests.pictures import make_folder, names_of, pack_labels, random_labels
from tests.runs import SMALL, assert_same_runs, rows_of, run_of, small, stop_at
from tests.test_checkpoint import published_state
from tests.test_recipes import PUBLISHED, published_commands


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()  # what other tests compiled does not count towards the limit of recompilations


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("flags, config", [
    (["--no-refine"], dict(refine=False)), (["--no-share"], dict(share=False)), (["--expand", "2"], dict(expand=2)),
    (["--kernel-size", "5"], dict(kernel_size=5)), (["--linear"], dict(linear=True, share=False)),
    (["--drop-path", "0.2"], dict(drop_path=0.2)), (["--img-size", "24"], dict(img_size=24)),
    (["--patch-size", "4"], dict(patch_size=4)), (["--model", "s"], dict(dim=384, depth=16)),
])
def test_flags_of_the_model_reach_it(pictures, flags, config):
    found = asdict(run_of(pictures, *flags).model.config)
    assert {name: found[name] for name in config} == config
    assert found["num_classes"] == 3 and not found["dense"]


def test_flags_of_a_stream_reach_it(pictures):
    run = run_of(pictures, "--storage", "stream", "--workers", "1", "--randaugment", "3", "--flip", "0.2", "--skip-bad",
                 "--crop-min", "0.4", "--colour", "0.1")
    split = run.subset.train
    assert (split.loader.num_workers, split.skip_bad, split.loader.dataset.seed) == (1, True, 0)
    stream = split.loader.dataset.transform
    assert (stream.randaugment.magnitude, stream.flip, stream.cropping.scale) == (3, 0.2, (0.4, 1.0))
    assert stream.draft and not run_of(
        pictures, "--storage", "stream", "--workers", "0", "--no-draft").subset.train.loader.dataset.draft
    assert run.augment.area is None and run.augment.colour == 0.1
    score = run.evaluate()
    assert 0 < score.loss < 10 and 0 <= score.right <= score.count == 12


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs 0 must be at least 1"), (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    (["--lr", "0"], "--lr 0.0 must be at least"),
    (["--smoothing", "2"], "--smoothing 2.0 must be at least 0 and at most 1"),
    (["--warmup-epochs", "3"], "--warmup-epochs 3 and --cooldown-epochs 0 must fit into --epochs 2"),
    (["--crop-min", "0.9", "--crop-max", "0.5"], "--crop-min 0.9 must not be above --crop-max 0.5"),
    (["--workers", "-1"], "--workers -1 must be at least 0 and at most"),
    (["--workers", "100000"], "--workers 100000 must be at least 0 and at most .*, eight times the"),
    (["--eval-batch-size", str(10**30)], "--eval-batch-size 10{30} must be at least 1 and at most 16777216"),
    (["--save-every", "nan"], "--save-every nan must be above 0"),
    (["--device", "meta"], "--device meta cannot be used here"),
    (["--img-size", "2", "--patch-size", "2", "--batch-size", "1"], "over which BatchNorm cannot count"),
    (["--resume", "a", "--weights", "b.pt"], "leave out --weights"), (["--resume", "a", "--out", "b"], "and --out"),
    (["--finetune", "--resume", "auto"], "--finetune needs --weights PATH"),
    (["--compile", "--checkpoint-maps"], "--compile does not go with --checkpoint-maps"),
    (["--sync-bn", "--accumulate", "2"], "--sync-bn does not go with --accumulate"),
    (["--accumulate", "0"], "--accumulate 0 must be at least 1"),
    (["--accumulate", "3"], "--batch-size 10 must be a multiple of 3, the processes times --accumulate 3"),
    (["--batch-size", "1000"], "--batch-size 1000 is larger than the 24 training pictures"),
    (["--img-size", "17"], "patch_size=8 must divide img_size=17"),
    (["--linear", "--share"], "linear=True, unrefined=False: not with refine=True, share=True"),
    (["--device", "nonsense"], "--device nonsense cannot be used here"),
    (["--weights", "none.pt"], "there is no checkpoint none.pt"), (["--resume"], "there is no checkpoint .*last.pt"),
    (["--eval"], "there is no checkpoint .*best.pt"),
    (["--finetune"], "--finetune needs --weights PATH"), (["--eval-batch-size", "0"], "--eval-batch-size 0 must be at"),
    (["--randaugment", "9"], "--randaugment 9 is for streamed sets: --storage stream, or --randaugment 0"),
    (["--storage", "stream", "--turn", "5"], "--turn 5 is for sets in memory: --storage memory, or --turn 0"),
    (["--storage", "stream", "--crop-max", "1.5"], "--crop-max 1.5 is for sets in memory: .* or --crop-max 1"),
    (["--randaugment", "11"], "--randaugment 11.0 must be at least 0 and at most 10"),
])
def test_flags_that_do_not_go(pictures, flags, message):
    with pytest.raises(UserError, match=message):
        train.main(small(pictures, *flags))
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.slow
def test_the_default_run_on_the_digits_in_little(capsys):
    flags = ["--img-size", "16", "--epochs", "3", "--batch-size", "100", "--device", "cpu"]
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    out = Path("runs/digits")
    assert sorted(file.name for file in out.iterdir()) == [
        "best.pt", "config.json", "curves.png", "last.backup.pt", "last.pt", "metrics.csv", "steps.csv"]
    rows = rows_of(out)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and rows[-1]["step"] == "42"
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    record = json.loads((out / "config.json").read_text())
    assert record["recipe"]["batch_size"] == 100 and record["classes"] == [str(digit) for digit in range(10)]
    assert record["versions"]["torch"] == torch.__version__ and record["pictures"] == {"train": 1442, "val": 355}
    assert record["result"]["accuracy"] == float(rows[-1]["val_accuracy"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert said.index("recipe: ") < said.index("epoch     step")  # what was chosen is printed first

    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    right = round(float(best["val_accuracy"]) * 355)
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert train.main(["--eval", "--device", "cpu"]) == 0  # best.pt of runs/digits
    assert f"({right} of 355)" in capsys.readouterr().out
    last = round(float(rows[-1]["val_accuracy"]) * 355)
    assert train.main(["--eval", "--device", "cpu", "--weights", str(out / "last.pt"), "--batch-size", "7"]) == 0
    assert f"({last} of 355)" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in out.iterdir()} == before  # looking changes nothing

    with pytest.raises(UserError, match=r"runs/digits holds a run already .*--resume runs/digits"):
        train.main(flags)
    assert train.main(["--resume", "--device", "cpu"]) == 0  # it is finished: nothing is trained
    assert rows_of(out) == rows


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof", "folder"])
def test_photos(pictures, subset, capsys):
    assert train.main(["--subset", subset, "--data", str(pictures), *SMALL, "--mixup", "0.8", "--cutmix", "1"]) == 0
    said = capsys.readouterr().out
    assert f"{subset}: on" in said and "24 pictures to train on; 12 to validate, 3 classes" in said
    assert json.loads(Path(f"runs/{subset}/config.json").read_text())["classes"][0] == "tench"


@pytest.mark.slow
def test_imagenet(tmp_path, capsys):
    wnids = data.imagenet_wnids()
    root = make_folder(tmp_path / "imagenet", train=1, val=1, size=(8, 8), classes=wnids)
    flags = ["--subset", "imagenet", "--data", str(root), "--model", "ti", "--img-size", "16", "--patch-size", "8",
             "--epochs", "1", "--batch-size", "500", "--workers", "2", "--device", "cpu"]
    assert train.main(flags) == 0
    assert rows_of("runs/imagenet")[0]["step"] == "2"

    torch.manual_seed(0)
    released = {"state_dict": published_state(refiner_vit_s(img_size=32))}
    torch.save(released, "published.pth.tar")
    evaluate = ["--img-size", "32", "--eval", "--workers", "0", "--device", "cpu", "--weights", "published.pth.tar"]
    assert train.main(["--subset", "imagenet", "--data", str(root), *evaluate]) == 0
    assert "of 1000)" in capsys.readouterr().out
    few = make_folder(tmp_path / "few", train=1, val=1)
    with pytest.raises(UserError, match="published.pth.tar knows 1000 classes, not the 3 of folder"):
        train.main(["--subset", "folder", "--data", str(few), "--model", "s", "--patch-size", "16", *evaluate])


@pytest.mark.slow
def test_digit_scenes(capsys):
    """A little of the preset, and its tokens' accuracy: as counted here, and as --eval says."""
    flags = ["--subset", "digit-scenes", "--device", "cpu", "--epochs", "1", "--lr", "1e-9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes.SceneSplit, "__len__", lambda self: 128)
        assert train.main(flags) == 0
    row = rows_of("runs/digit-scenes")[0]
    assert json.loads(Path("runs/digit-scenes/config.json").read_text())["result"]["token_accuracy"] == float(
        row["val_token_accuracy"])
    assert "of tokens" in capsys.readouterr().out
    assert train.main(["--eval", "--subset", "digit-scenes", "--device", "cpu"]) == 0
    net, state = checkpoint.load_model("runs/digit-scenes/best.pt")
    batch = next(data.load_subset("digit-scenes", None, 32).val.epoch(torch.arange(1000), 1000))
    with torch.no_grad():
        output = net.forward_head(net.forward_features(normalise(batch.pictures)))
    labelled = batch.token_labels.sum(dim=2) > 0
    right = (output.token_logits.argmax(dim=2) == batch.token_labels.argmax(dim=2))[labelled].float().mean().item()
    said = re.search(r"of tokens ([\d.]+) %", capsys.readouterr().out.splitlines()[-1])
    assert float(said.group(1)) / 100 == pytest.approx(right, abs=2e-4)


def test_a_run_validates_on_what_is_held_out_and_evaluation_on_val(pictures, capsys):
    words = small(pictures, "--hold-out", "0.25")
    assert train.main(words) == 0
    assert "18 pictures to train on; 6 to validate" in capsys.readouterr().out
    assert train.main(["--eval", "--weights", "runs/folder/best.pt", "--device", "cpu"]) == 0
    assert "\n12 to validate" in capsys.readouterr().out
    assert train.main(["--eval", "--weights", "runs/folder/best.pt", "--device", "cpu", "--hold-out", "0.25"]) == 0
    assert "\n6 to validate" in capsys.readouterr().out


def test_evaluation_needs_no_training_set_and_builds_no_optimizer(pictures, monkeypatch, capsys):
    """The validation pictures alone give the accuracy of the run, decoded and streamed, of weights with an average."""
    # a run measures its raw weights in its own number format, --eval in float32: with --amp off they are the same
    assert train.main(small(pictures, "--ema", "0.9", "--amp", "off")) == 0
    row = rows_of("runs/folder")[-1]
    right = round(float(row["val_accuracy"]) * 12)
    shutil.copytree(pictures / "val", "alone/val")

    def refuse(*words, **options):
        raise AssertionError("evaluation trains nothing")

    for name in ("AdamW", "lr_scheduler.LambdaLR"):
        monkeypatch.setattr(f"torch.optim.{name}", refuse)
    monkeypatch.setattr(engine, "deepcopy", refuse)
    words = ["--eval", "--weights", "runs/folder/last.pt", "--data", "alone", "--device", "cpu", "--workers", "1"]
    capsys.readouterr()
    assert train.main(words) == 0
    said = capsys.readouterr().out
    assert f"({right} of 12), loss {float(row['val_loss']):.4f}" in said
    assert "\n12 to validate, 3 classes\n" in said and "weights of runs/folder/last.pt: their moving average" in said
    assert train.main([*words, "--storage", "stream", "--eval-batch-size", "5"]) == 0
    assert f"({right} of 12)" in capsys.readouterr().out  # the same pictures
    assert train.main([*words, "--eval-weights", "raw"]) == 0
    said, right = capsys.readouterr().out, round(float(row["val_accuracy_raw"]) * 12)
    assert "weights of runs/folder/last.pt: raw" in said and f"({right} of 12)" in said
    with pytest.raises(UserError, match="runs/folder/best.pt holds no raw weights, only ema"):
        train.main(["--eval", "--data", "alone", "--subset", "folder", "--eval-weights", "raw", "--device", "cpu"])
    shutil.rmtree("alone/val")
    with pytest.raises(UserError, match="alone has no folder val/"):
        train.main(words)


@pytest.mark.parametrize("flags", [["--no-refine"], ["--linear"], ["--no-share"], ["--expand", "1"], ["--amp", "bf16"],
                                   ["--amp", "fp16"], ["--kernel-size", "1"], ["--ema", "0"]], ids=" ".join)
def test_every_form_trains(pictures, flags):
    assert train.main(small(pictures, *flags, "--epochs", "1")) == 0


@pytest.mark.slow
def test_compile(pictures, monkeypatch, nothing_compiled):
    """--compile hands the network to torch.compile; a backend that needs no C++ compiler stands in for the default."""
    compiled = []

    def compile_eagerly(network, real=torch.compile):
        compiled.append(network)
        return real(network, backend="aot_eager", fullgraph=True)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile_eagerly)
        assert train.main(small(pictures, "--compile", "--amp", "off")) == 0
    assert len(compiled) == 1
    os.rename("runs", "compiled")
    assert train.main(small(pictures, "--amp", "off")) == 0
    one, two = (float(rows_of(out)[-1]["train_loss"]) for out in ("compiled/folder", "runs/folder"))
    assert one == pytest.approx(two, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Token labels


def test_relabel_teaches_a_token_head(pictures, labels):
    run = run_of(pictures, "--relabel", labels)
    assert run.recipe.dense_weight == 0.5 and run.model.config.dense
    assert run.origin()["annotator"] == "hand at 64 px" and run.origin()["relabel"] == labels
    assert run_of(pictures, "--relabel", labels, "--dense-weight", "0.2").criterion.dense_weight == 0.2
    alone = run_of(pictures, "--relabel", labels, "--dense-weight", "0")  # ReLabel: the class token's label only
    assert not alone.model.config.dense
    assert not run_of(pictures).model.config.dense
    assert run_of(pictures, "--dense-weight", "0.3").model.config.dense


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--mix-token"], ["--mixup", "0.8", "--cutmix", "1.0", "--mix-token"], ["--turn", "20", "--crop-max", "1.3"],
    ["--dense-weight", "0", "--mix-token"], ["--no-token-labels"], ["--compile", "--mix-token", "--cutmix", "1"],
])
def test_every_way_of_learning_from_maps_trains(pictures, labels, flags, monkeypatch, nothing_compiled):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile_model(net, backend="aot_eager"))
    assert train.main(small(pictures, "--relabel", labels, "--out", "run", *flags)) == 0
    assert len(rows_of("run")) == 2 and "val_token_accuracy" not in rows_of("run")[0]
    assert train.main(["--eval", "--out", "run", "--subset", "folder", "--data", str(pictures)]) == 0


@pytest.mark.slow
def test_a_stream_with_maps_trains_alike_with_any_workers(pictures, labels):
    for workers in ("0", "2"):
        flags = ["--relabel", labels, "--randaugment", "9", "--mix-token", "--cutmix", "1", "--workers", workers,
                 "--storage", "stream"]
        assert train.main(small(pictures, "--out", f"run{workers}", *flags)) == 0
    assert_same_runs("run0", "run2")


def test_maps_do_not_go_with_an_evaluation(pictures, labels):
    with pytest.raises(UserError, match="--relabel does not go with --eval"):
        train.main([*small(pictures), "--eval", "--relabel", labels])


def test_pictures_without_maps_stop_a_run_before_it_starts(pictures):
    store = pack_labels(Path("store"), names_of(pictures)[1:], *random_labels(23))
    with pytest.raises(UserError, match="store has no map for 1 of the 24 training pictures"):
        train.main(small(pictures, "--relabel", str(store), "--out", "run"))
    assert not Path("run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def start(pictures, out, *flags):
    command = [sys.executable, "-u", "-m", "refiner_min.train", *small(pictures, "--epochs", "6", "--out", out, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(pictures, out, *flags):
    assert train.main(small(pictures, "--epochs", "6", "--out", out, *flags)) == 0


def wait_for_step(process, step: int):
    """Until the run's table shows that many steps."""
    for line in process.stdout:
        words = line.split()
        if len(words) == 8 and words[1].isdigit() and int(words[1]) >= step:
            return
    raise AssertionError("the run ended before that")


@pytest.mark.slow
def test_killed_and_resumed_is_as_never_stopped(pictures):
    finish(pictures, "whole")
    process = start(pictures, "killed")
    wait_for_step(process, 4)
    time.sleep(0.02 * torch.rand(()).item())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    finish(pictures, "killed", "--resume")
    assert_same_runs("whole", "killed")


@pytest.mark.slow
def test_killed_before_the_first_epoch_ended(pictures):
    process = start(pictures, "early")
    while not Path("early/last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(pictures, "early", "--resume")
    finish(pictures, "whole")
    assert_same_runs("whole", "early")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(pictures, number, status):
    process = start(pictures, "stopped", "--epochs", "400")
    wait_for_step(process, 2)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == status, said
    assert "Traceback" not in said
    command = re.search(r"go on: python (-m refiner_min.train --resume stopped --device cpu)$", said.strip()).group(1)
    step = checkpoint.load("stopped/last.pt")["step"]
    assert f"stopped after step {step};" in said
    process = subprocess.Popen([sys.executable, "-u", *command.split()], stdout=subprocess.PIPE, text=True)
    wait_for_step(process, step + 1)
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["decoded", "streamed"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopped_at_any_step_and_resumed_is_as_never_stopped(pictures, monkeypatch, streams, stop_after):
    """With everything that draws at random: order, crops, colour, erasing, mixup or cutmix, drop path."""
    flags = small(pictures, "--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.3", "--erasing", "0.5", "--colour",
                  "0.3", "--ema", "0.9", "--workers", "1", "--amp", "off", *["--storage", "stream"] * streams)
    assert train.main([*flags, "--out", "whole"]) == 0

    with monkeypatch.context() as patch:
        stop_at(patch, stop_after)
        assert train.main([*flags, "--out", "stopped"]) == 143
    assert checkpoint.load("stopped/last.pt")["step"] == stop_after
    torch.manual_seed(99)  # another state of the generators
    assert train.main(["--resume", "stopped", "--device", "cpu", "--workers", "1"]) == 0
    assert_same_runs("whole", "stopped")


def test_stopped_and_resumed_with_maps_is_as_never_stopped(pictures, labels, monkeypatch):
    flags = ["--relabel", labels, "--mix-token", "--mixup", "0.8", "--cutmix", "1", "--ema", "0.9"]
    assert train.main(small(pictures, "--out", "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(small(pictures, "--out", "stopped", *flags)) == 128 + 15
    assert train.main(["--resume", "stopped", "--device", "cpu"]) == 0  # which knows its maps
    assert_same_runs("whole", "stopped")
    other = pack_labels(Path("other"), names_of(pictures), *random_labels(24), annotator="another")
    with pytest.raises(UserError, match="annotator .hand at 64 px there, another at 64 px here."):
        train.main(["--resume", "stopped", "--device", "cpu", "--relabel", str(other)])


@pytest.mark.slow
def test_one_command_begins_a_run_and_restarts_it(pictures, tmp_path, monkeypatch, capsys):
    """As a scheduler does: killed before anything was saved, in an epoch, and started once more when all was done."""
    finish(pictures, "whole")
    words = small(pictures, "--epochs", "6", "--out", "auto", "--resume", "auto", "--amp", "auto")
    assert train.main(small(pictures, "--epochs", "1", "--out", "first")) == 0
    Path("auto").mkdir()  # killed before its first save
    command = [sys.executable, "-u", "-m", "refiner_min.train", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for_step(process, 4)
    process.kill()
    process.communicate()
    assert train.main(words) == 0
    assert_same_runs("whole", "auto")
    (Path("auto") / "last.pt").unlink()  # killed between the two renames of a save
    capsys.readouterr()
    assert train.main([*words, "--weights", "first/best.pt"]) == 0  # which it began with, say
    assert "weights of first" not in capsys.readouterr().out
    assert_same_runs("whole", "auto")
    other = small(pictures, "--out", "from", "--resume", "auto", "--weights", "first/best.pt")
    assert train.main(other) == 0
    assert "weights of first/best.pt" in capsys.readouterr().out


def test_saved_on_the_way_and_killed_is_as_never_stopped(pictures, monkeypatch):
    """With a clock that is due after every step, and a kill after the first step of an epoch."""
    assert train.main(small(pictures, "--out", "whole")) == 0
    saves = []
    save = engine.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "save", lambda run, clock: (saves.append(run.step), save(run, clock)))
        step = engine.Run.train_step

        def killed(run, *words):
            if run.step == 3:
                raise SystemExit("killed")
            step(run, *words)

        patch.setattr(engine.Run, "train_step", killed)
        with pytest.raises(SystemExit):
            train.main(small(pictures, "--out", "killed", "--save-every", "1e-9"))
    assert saves == [1, 2, 3] and checkpoint.load("killed/last.pt")["step"] == 3
    assert checkpoint.load("killed/last.pt")["loss"][1] == 10  # pictures of the epoch so far
    assert train.main(["--resume", "killed", "--device", "cpu"]) == 0
    assert_same_runs("whole", "killed")


@pytest.mark.parametrize("parts", [1, 3])
def test_in_parts_stopped_and_gone_on_with(pictures, monkeypatch, capsys, parts):
    """A run in parts ends with the same bits when it is stopped, and says so when it goes on with others."""
    flags = ["--batch-size", "6", "--accumulate", "3", "--amp", "off"]
    assert train.main(small(pictures, "--out", "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert train.main(small(pictures, "--out", "stopped", *flags)) == 143
    said = capsys.readouterr().out
    assert "stopped after step 6; to go on: python -m refiner_min.train --resume stopped" in said
    assert "--accumulate 3" in said
    assert train.main(["--resume", "stopped", "--device", "cpu", "--accumulate", str(parts)]) == 0
    said = capsys.readouterr().out
    told = "begun with a batch in 3 parts (processes, times --accumulate), it goes on with 1: " in said
    assert told == (parts == 1)
    if parts == 3:
        assert_same_runs("whole", "stopped")


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory")], ids=["GPU", "CPU"])
def test_a_memory_that_is_too_small_is_told_what_helps(pictures, monkeypatch, raised):
    def full(run, *words):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "train_step", full)
        with pytest.raises(UserError, match="^5 pictures of 16 px at once are too many for the memory: "
                                            "--accumulate 5 takes a batch in more parts, .* --resume big goes on"):
            train.main(small(pictures, "--out", "big", "--accumulate", "2"))
    assert train.main(["--resume", "big", "--device", "cpu", "--accumulate", "5"]) == 0
    monkeypatch.setattr(train, "evaluate", full)
    with pytest.raises(UserError, match="^the memory is too small: try a smaller --eval-batch-size or --img-size$"):
        train.main(small(pictures, "--out", "big", "--eval"))
    monkeypatch.setattr(compiling, "MANY", 1)
    monkeypatch.setattr(compiling, "step", full)  # of the trial, before there is a run to go on with
    with pytest.raises(UserError, match="^the memory is too small: try a smaller --batch-size, more parts "):
        train.main(small(pictures, "--out", "tried"))
    assert not Path("tried").exists()


def test_the_first_process_chooses_the_number_format_for_all(pictures, monkeypatch):
    def from_first(make):  # as another process hears it
        monkeypatch.setattr(train.hardware, "hardware_amp", lambda device: "off")
        return make()

    monkeypatch.setattr(train.hardware, "hardware_amp", lambda device: "bf16")
    assert run_of(pictures).recipe.amp == "bf16"
    monkeypatch.setattr(train.distributed, "from_first", from_first)
    assert run_of(pictures).recipe.amp == "off"


def test_a_branch_that_is_off_stays_off(pictures, monkeypatch):
    """The refined map is the shared one, normalised; also of a run that was stopped between."""
    assert train.main(small(pictures, "--branch-scale", "0", "--out", "whole")) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(small(pictures, "--branch-scale", "0", "--out", "stopped")) == 128 + signal.SIGTERM
    assert train.main(["--resume", "stopped", "--device", "cpu"]) == 0
    assert_same_runs("whole", "stopped")
    model, _ = checkpoint.load_model("stopped/best.pt")
    maps, refinement = model.attention_maps(torch.randn(2, 3, 16, 16))[1], model.blocks[1].attention.refinement
    norm = refinement.norm
    expected = (maps.raw - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    expected = refinement.scale * (norm.weight[:, None, None] * expected + norm.bias[:, None, None])
    shift = refinement.scale * norm.weight * refinement.reduce[1].bias / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(maps.refined, expected + shift[:, None, None], atol=1e-5)
    again = run_of(pictures, "--branch-scale", "0.5", "--weights", "whole/best.pt").model  # of given weights as well
    assert again.blocks[1].attention.refinement.reduce[1].weight.tolist() == [0.5] * 4
    assert torch.equal(again.blocks[1].attention.refinement.norm.weight, norm.weight)  # which keep the rest


def test_validated_every_few_epochs_and_after_the_last(pictures, monkeypatch):
    """The same weights; a row stands for the epochs since the row before, also of a run that was stopped between."""
    flags = ("--epochs", "5", "--ema", "0.9")
    assert train.main(small(pictures, *flags, "--out", "each")) == 0
    assert train.main(small(pictures, *flags, "--out", "some", "--validate-every", "2")) == 0
    each, some = rows_of("each"), rows_of("some")
    assert [row["epoch"] for row in some] == ["2", "4", "5"]
    for row in some:
        same = each[int(row["epoch"]) - 1]
        assert all(row[name] == same[name] for name in ("step", "lr", "val_loss", "val_accuracy", "val_accuracy_raw"))
    means = [float(row["train_loss"]) for row in each]
    assert [float(row["train_loss"]) for row in some] == pytest.approx(
        [sum(means[:2]) / 2, sum(means[2:4]) / 2, means[4]])
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * 3 - 1)  # in the third epoch
        assert train.main(small(pictures, *flags, "--out", "stopped", "--validate-every", "2")) == 128 + signal.SIGTERM
    assert train.main(["--resume", "stopped", "--device", "cpu"]) == 0
    assert_same_runs("some", "stopped")


def test_killed_between_the_last_step_of_an_epoch_and_its_evaluation(pictures, monkeypatch):
    assert train.main(small(pictures, "--out", "whole")) == 0

    def killed(*words):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "validate", killed)
        with pytest.raises(SystemExit):
            train.main(small(pictures, "--out", "killed", "--save-every", "1e-9"))
    assert train.main(["--resume", "killed", "--device", "cpu"]) == 0
    assert_same_runs("whole", "killed")


def test_a_first_save_that_failed_leaves_a_folder_that_can_be_used(pictures, monkeypatch):
    def full(*words, **options):
        raise UserError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(UserError, match="disk full"):
            train.main(small(pictures, "--out", "run"))
    assert train.main(small(pictures, "--out", "run")) == 0


def test_two_runs_do_not_begin_in_one_folder(pictures, monkeypatch):
    """The second one finds the folder empty, too, before it has opened its data; and is refused."""
    made = train.new_run

    def slow(*words):
        run = made(*words)
        if not Path("run/last.pt").exists():
            monkeypatch.setattr(train, "new_run", made)
            assert train.main(small(pictures, "--out", "run", "--epochs", "1", "--seed", "1")) == 0
        return run

    monkeypatch.setattr(train, "new_run", slow)
    with pytest.raises(UserError, match="run holds a run already"):
        train.main(small(pictures, "--out", "run"))
    assert checkpoint.load("run/last.pt")["recipe"]["seed"] == 1


def test_evaluation_of_weights_from_elsewhere_takes_the_set_that_is_here(pictures, monkeypatch):
    """The folder that they were trained on is where there is one, else the subset's own."""
    assert train.main(small(pictures, "--out", "run")) == 0
    state, asked = checkpoint.load("run/best.pt") | {"subset": "imagenette"}, []
    monkeypatch.setattr(train, "open_subset", lambda args, *words: asked.append(args.data) or sys.exit())
    for folder in (str(pictures), "data/of-another-machine"):
        checkpoint.save(state | {"data": folder}, "best.pt")
        with pytest.raises(SystemExit):
            train.main(["--eval", "--weights", "best.pt", "--device", "cpu"])
    assert asked == [str(pictures), None]


def test_evaluation_of_the_run_that_resume_names(pictures, capsys):
    assert train.main(small(pictures, "--out", "mine")) == 0
    capsys.readouterr()
    assert train.main(["--eval", "--resume", "mine", "--device", "cpu"]) == 0
    assert "weights of mine/best.pt" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_an_epoch_not_the_run(pictures, capsys):
    finish(pictures, "whole")
    finish(pictures, "damaged")
    (Path("damaged") / "last.pt").write_bytes(b"half of it")
    finish(pictures, "damaged", "--resume")
    assert "going on from the one before it" in capsys.readouterr().out
    assert_same_runs("whole", "damaged")


def test_resuming_with_other_flags_is_refused(pictures):
    assert train.main(small(pictures, "--out", "a")) == 0
    for flags, fields_named in ((["--lr", "0.5", "--expand", "2"], ("lr (", "0.5 here", "expand (3 there, 2 here)")),
                                (["--subset", "imagenette"], ("subset (folder there, imagenette here)",))):
        with pytest.raises(UserError) as error:
            train.main(["--resume", "a", "--device", "cpu", *flags])
        for named in ("a/last.pt was made with another configuration", *fields_named):
            assert named in str(error.value)
    other = make_folder(Path("other"), train=9, val=4)
    with pytest.raises(UserError, match=r"a/last.pt was made with another configuration: pictures \("):
        train.main(["--resume", "a", "--device", "cpu", "--data", str(other)])
    with pytest.raises(UserError, match=r"storage \(memory there, stream here\)"):
        train.main(["--resume", "a", "--device", "cpu", "--storage", "stream"])
    state = checkpoint.load("a/last.pt")
    Path("earlier").mkdir()
    checkpoint.save({name: value for name, value in state.items() if name != "recipe_version"}, "earlier/last.pt")
    with pytest.raises(UserError, match="earlier/last.pt was written by another version .* begin the run again"):
        train.main(["--resume", "earlier", "--device", "cpu"])
    Path("later").mkdir()
    checkpoint.save(state | {"recipe": state["recipe"] | {"later": 1}}, "later/last.pt")
    for flags in (["--resume", "later"], ["--eval", "--weights", "later/last.pt"]):
        with pytest.raises(UserError, match="later/last.pt was written by another version of refiner_min"):
            train.main([*flags, "--device", "cpu"])
    with pytest.raises(UserError, match="best.pt is no checkpoint to go on from"):
        train.main(["--resume", "a/best.pt", "--device", "cpu"])


# ----------------------------------------------------------------------------------------------------------------------
# Weights of another run


def test_starting_from_weights(pictures, tmp_path):
    assert train.main(small(pictures, "--out", "a")) == 0
    best = checkpoint.load("a/best.pt")
    run = run_of(pictures, "--weights", "a/best.pt", "--seed", "5", "--img-size", "24")  # another grid
    assert torch.equal(run.model.head.weight, best["ema"]["head.weight"])
    assert run.model.position.shape[1] == 10
    other = make_folder(tmp_path / "other", classes=("a", "b", "c"))
    run = run_of(other, "--weights", "a/best.pt", "--seed", "5")  # other classes: a new head
    assert not torch.equal(run.model.head.weight, best["ema"]["head.weight"])
    assert torch.equal(run.model.norm.weight, best["ema"]["norm.weight"])
    with pytest.raises(UserError, match=r"a/best.pt was made with another configuration: expand \(3 there, 2 here\)"):
        run_of(pictures, "--weights", "a/best.pt", "--expand", "2")
    with pytest.raises(UserError, match="a/best.pt knows tench, .* not the classes of folder"):
        train.main(["--eval", "--weights", "a/best.pt", "--data", str(other), "--device", "cpu"])
    with pytest.raises(UserError, match=r"expand \(3 there, 2 here\)"):
        train.main(["--eval", "--weights", "a/best.pt", "--expand", "2", "--device", "cpu"])


@pytest.mark.parametrize("there, here, said", [
    ("0.5", "0", "raw; its token head is left out"), ("0", "0.5", "raw; the token head is new: it has none"),
    ("0.5", "0.5", "raw"), ("0", "0", "raw")])
def test_a_token_head_that_only_one_side_has(pictures, there, here, said, capsys):
    assert train.main(small(pictures, "--out", "a", "--dense-weight", there, "--epochs", "1", "--ema", "0")) == 0
    capsys.readouterr()
    run = run_of(pictures, "--weights", "a/best.pt", "--dense-weight", here, "--seed", "5")
    assert f"weights of a/best.pt: {said}\n" in capsys.readouterr().out
    best = checkpoint.load("a/best.pt")["model"]
    assert run.model.config.dense == (here != "0") and torch.equal(run.model.head.weight, best["head.weight"])
    if there == here == "0.5":
        assert torch.equal(run.model.token_head.weight, best["token_head.weight"])


@pytest.mark.slow
def test_finetuning_at_another_size_keeps_what_was_learnt(capsys):
    """Digits at 32 px, then at 48 px: within a point of where it began, or above."""
    assert train.main(["--epochs", "5", "--device", "cpu", "--out", "small"]) == 0
    before = float(rows_of("small")[-1]["val_accuracy"])
    flags = ["--weights", "small/best.pt", "--finetune", "--img-size", "48", "--device", "cpu"]
    assert train.main([*flags, "--out", "large"]) == 0
    rows = rows_of("large")
    assert before > 0.9 and float(rows[-1]["val_accuracy"]) > before - 0.01
    assert checkpoint.load("large/best.pt")["config"]["img_size"] == 48
    assert train.main(["--resume", "large", "--device", "cpu"]) == 0  # the recipe is in the file


def test_published_weights_are_evaluated_as_they_were(tmp_path, monkeypatch, capsys):
    """Size, model and crop are theirs, val/ is enough, and the token head may be missing."""
    wnids = data.imagenet_wnids()[:4]
    monkeypatch.setattr(data, "imagenet_wnids", lambda: wnids)
    root = make_folder(tmp_path / "set", train=1, val=3, size=(50, 40), classes=wnids)
    shutil.rmtree(root / "train")
    seen = []
    monkeypatch.setattr(data, "evaluation_picture", lambda picture, size, crop: seen.append((size, crop))
                        or evaluation_picture(picture, size, crop))
    for dense, kind in ((True, "raw"), (False, "ema")):
        torch.manual_seed(0)
        source = refiner_vit_m(img_size=32, num_classes=4, dense=dense).eval()
        torch.save({"state_dict": published_state(source), "state_dict_ema": published_state(source)}, "m.pth.tar")
        words = ["--subset", "imagenet", "--data", str(root), "--eval", "--weights", "m.pth.tar", "--device", "cpu",
                 "--workers", "0", "--eval-weights", kind, "--eval-batch-size", "7"]
        assert train.main(words) == 0
        pictures = [evaluation_picture(read_picture(path), 32, 1.0) for path in sorted((root / "val").rglob("*.png"))]
        with torch.no_grad():
            found = source(normalise(torch.stack(pictures))).argmax(dim=1)
        right = int((found == torch.arange(4).repeat_interleave(3)).sum())
        said = capsys.readouterr().out
        assert f"({right} of 12)" in said and "top-1" in said
        assert f"weights of m.pth.tar: {'raw' if kind == 'raw' else 'their moving average'}" in said
    assert set(seen) == {(32, 1.0)}  # that of model M


@pytest.mark.slow
@pytest.mark.parametrize("row, published", list(enumerate(PUBLISHED)), ids=str)
def test_the_commands_of_the_published_models_run(row, published, tmp_path, monkeypatch):
    """Each row of the table, on a few generated pictures at 32 px, and 48 px where it fine-tunes: two steps each."""
    wnids = data.imagenet_wnids()[:3]
    monkeypatch.setattr(data, "imagenet_wnids", lambda: wnids)
    root = make_folder(tmp_path / "set", train=4, val=1, size=(40, 40), classes=wnids)
    pack_labels(Path("labels/imagenet"), names_of(root), *random_labels(12), classes=wnids)
    small_ones = ["--data", str(root), "--batch-size", "6", "--epochs", "1", "--device", "cpu", "--workers", "0"]
    for command, size in zip(published_commands()[row], ("32", "48")):
        assert train.main([*shlex.split(command), *small_ones, "--img-size", size]) == 0
        out = Path(train.parse(shlex.split(command))[0].out)
        assert rows_of(out)[-1]["step"] == "2"


def test_going_on_names_a_command_that_works(pictures):
    """Without --weights, which a resumed run has of its own; with what the checkpoint does not hold."""
    words = small(pictures, "--weights", "a.pt", "--finetune", "--workers", "1", "--skip-bad", "--out", "b")
    args, _ = train.parse(words)
    assert train.resuming(args, Path("b")) == ["--resume", "b", "--device", "cpu", "--workers", "1", "--skip-bad"]
    assert train.parse(train.resuming(args, Path("b")))[0].resume == "b"


def test_starting_from_published_weights(pictures):
    torch.manual_seed(1)
    source = refiner_vit_s(img_size=32)
    torch.save({"state_dict": published_state(source)}, "published.pth.tar")
    run = run_of(pictures, "--weights", "published.pth.tar", "--model", "s", "--patch-size", "16", "--img-size", "32")
    assert torch.equal(run.model.norm.weight, source.norm.weight)
    assert torch.equal(run.model.blocks[3].attention.qkv.weight, source.blocks[3].attention.qkv.weight)
    with pytest.raises(UserError, match="the weights do not fit"):
        run_of(pictures, "--weights", "published.pth.tar", "--model", "ti")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_numbers_of_processes_that_cannot_be_are_told_at_the_start(pictures, monkeypatch):
    assert train.main(small(pictures, "--epochs", "1", "--out", "run")) == 0
    commands = (small(pictures, "--out", "other"), ["--resume", "run", "--device", "cpu"],
                ["--eval", "--weights", "run/best.pt", "--device", "cpu"])
    monkeypatch.setattr(train.distributed, "world", lambda: 13)
    for words in commands:
        with pytest.raises(UserError, match="13 processes are more than the 12 pictures to validate: start fewer"):
            train.main(words)
    monkeypatch.setattr(train.distributed, "world", lambda: 3)
    for words in commands[:2]:
        with pytest.raises(UserError, match="--batch-size 10 must be a multiple of the 3 processes"):
            train.main(words)


def test_going_on_elsewhere_is_recorded(pictures, monkeypatch):
    flags = small(pictures, "--out", "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert train.main(flags) == 143
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main(["--resume", "run", "--device", "cpu"]) == 143
    made = json.loads(Path("run/config.json").read_text())
    assert "resumed" not in made  # by the same, on the same
    monkeypatch.setattr(train.records, "package_commit", lambda: "later")
    for _ in range(2):  # the second time it is at its end
        assert train.main(["--resume", "run", "--device", "cpu"]) == 0
    record = json.loads(Path("run/config.json").read_text())
    told = {"step": 2, "hardware": made["hardware"], "versions": made["versions"], "commit": "later"}
    assert record.pop("result") and record == made | {"resumed": [told]}


@pytest.mark.parametrize("content", ["", "{", "null", "[1]"])
def test_a_damaged_record_is_made_again_at_the_end(pictures, content):
    assert train.main(small(pictures, "--epochs", "1", "--out", "run")) == 0
    record = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(content)
    assert train.main(["--resume", "run", "--device", "cpu"]) == 0
    again = json.loads(Path("run/config.json").read_text())
    assert again.keys() == record.keys() and again["result"]["accuracy"] == record["result"]["accuracy"]


def test_a_mistake_is_one_sentence_and_status_2(pictures):
    command = [sys.executable, "-m", "refiner_min.train", *small(pictures, "--batch-size", "1000")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: --batch-size 1000 is larger than the 24 training pictures"]
    assert "Traceback" not in done.stderr and not Path("runs").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "last.pt", "best.pt"])
def test_another_run_is_not_overwritten(pictures, name):
    Path("mine").mkdir()
    (Path("mine") / name).write_text("precious")
    with pytest.raises(UserError, match=f"mine holds a run already .{name}."):
        train.main(small(pictures, "--out", "mine"))
    assert [file.read_text() for file in Path("mine").iterdir()] == ["precious"]


def test_an_out_that_cannot_be_made(pictures):
    Path("file").write_text("precious")
    with pytest.raises(UserError, match="--out file/run cannot be made"):
        train.main(small(pictures, "--out", "file/run"))
    assert Path("file").read_text() == "precious"


@pytest.mark.slow
def test_a_disk_that_fills_up(pictures):
    code = ("import resource, sys\nfrom refiner_min import checkpoint, run_command, train\n"
            "save = checkpoint.save\n"
            "def fill(state, path, **options):\n"
            "    if state.get('step'): resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
            "    save(state, path, **options)\n"
            "checkpoint.save = fill\n"
            "run_command(lambda: train.main(sys.argv[1:]))")
    command = [sys.executable, "-c", code, *small(pictures, "--out", "full")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "last.pt could not be written (no larger file is allowed here); what was there before" in done.stderr
    assert "Traceback" not in done.stderr and "enforce" not in done.stderr
    assert checkpoint.load("full/last.pt")["step"] == 0 and not list(Path("full").glob("*.tmp"))
    assert train.main(["--resume", "full", "--device", "cpu"]) == 0  # when there is room
    assert train.main(small(pictures, "--out", "whole")) == 0
    assert_same_runs("whole", "full")
