"""distributed.py: two processes on this machine train one run together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refiner_min import checkpoint, train
from tests.pictures import CLASSES, make_folder
from tests.runs import assert_same_runs, rows_of, run_of, small


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "refiner_min.train", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes(pictures, capsys):
    flags = small(pictures, "--out", "two", "--batch-size", "12", "--epochs", "1")
    done = torchrun(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures to train on") == 1  # one process speaks for both
    assert json.loads(Path("two/config.json").read_text())["processes"] == 2
    row = rows_of("two")[0]
    run = run_of(pictures, "--batch-size", "12")
    run.restore(checkpoint.load("two/last.pt"))  # what was saved is what was evaluated, BatchNorm's statistics too
    loss, right, *_ = run.evaluate()
    assert right / 12 == float(row["val_accuracy"]) and loss == pytest.approx(float(row["val_loss"]), abs=1e-6)
    assert run.loss.total[1] == 0  # an epoch's sums begin anew

    done = torchrun(*small(pictures), "--eval", "--weights", "two/best.pt", "--batch-size", "12")
    assert f"({right} of 12)" in done.stdout, done.stderr

    done = torchrun(*small(pictures, "--out", "odd", "--batch-size", "11"))
    assert "--batch-size 11 must be a multiple of the 2 processes" in done.stderr and not Path("odd").exists()
    done = torchrun(*small(pictures, "--out", "odd", "--batch-size", "12", "--sync-bn"))
    assert "--sync-bn is for processes on GPUs" in done.stderr and not Path("odd").exists()
    capsys.readouterr()
    assert train.main(["--resume", "two", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "begun with a batch in 2 parts (processes, times --accumulate), it goes on with 1: " in said
    assert "BatchNorm counts over 12 " in said


def start(*flags, restarts: int = 0):
    """Two processes under torchrun, in a session of their own."""
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), "-m", "refiner_min.train", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def workers_of(process) -> list[int]:
    """The training processes below the launcher."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"refiner_min.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until(process, step: int, out: str):
    deadline = time.monotonic() + 60
    while not Path(out, "metrics.csv").exists() or int(rows_of(out)[-1]["step"]) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_says_how_to_go_on(pictures):
    """What a scheduler does: launcher and processes get it at once, and the launcher hands it on."""
    process = start(*small(pictures, "--out", "two", "--batch-size", "12", "--epochs", "400"))
    wait_until(process, 4, "two")
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    step = checkpoint.load("two/last.pt")["step"]
    assert f"stopped after step {step}; to go on: torchrun --standalone --nproc-per-node 2 --max-restarts 0 -m " \
           f"refiner_min.train --resume two --device cpu" in said


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_with_a_sentence(pictures):
    process = start(*small(pictures, "--out", "two", "--batch-size", "12", "--epochs", "4000"))
    wait_until(process, 4, "two")
    os.kill(workers_of(process)[1], signal.SIGKILL)
    started = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - started < 60 and process.returncode
    assert "error: process 0 of 2 has lost another one" in said or "stopped after step" in said


@pytest.mark.slow
def test_ranks_that_are_killed_twice_and_restarted_end_as_never_disturbed(pictures):
    flags = ["--batch-size", "12", "--epochs", "60", "--resume", "auto", "--amp", "off"]
    assert start(*small(pictures, "--out", "whole", *flags)).wait(timeout=120) == 0
    process = start(*small(pictures, "--out", "killed", *flags), restarts=2)
    for kill, step in enumerate((10, 50)):
        wait_until(process, step, "killed")
        os.kill(workers_of(process)[kill], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert_same_runs("whole", "killed")


FIFTY_STEPS = """
import sys, torch
from torch import nn
from refiner_min import distributed, train
from refiner_min.augment import normalise
from refiner_min.records import StepLog
from refiner_min.stopping import SaveClock
from tqdm import tqdm
torch.set_default_dtype(torch.float64)
nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
class Stop:
    def agreed(self): return run.step >= 50
with distributed.process_group(torch.device("cpu")):
    run = train.new_run(*train.parse(sys.argv[2:]), torch.device("cpu"))
    run.augment = lambda batch: batch._replace(pictures=normalise(batch.pictures).double())
    log = StepLog(run)
    while run.step < 50:
        run.train_epoch(Stop(), tqdm(disable=True), SaveClock(20), log)
    if run.rank == 0:
        torch.save({"model": run.model.state_dict(), "ema": run.ema.state_dict(), "lr": run.scheduler.get_last_lr(),
                    "loss": run.loss.total}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_and_parts_take_the_steps_of_one():
    """50 steps on the digits in float64, without chance and with BatchNorm as in evaluation: the same to 1e-9."""
    Path("steps.py").write_text(FIFTY_STEPS)
    flags = ["--batch-size", "32", "--amp", "off", "--device", "cpu", "--depth", "2", "--dim", "48", "--out", "run"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launch, parts in (("one", [], 1), ("two", two, 1), ("parts", [], 4), ("both", two, 2)):
        command = [sys.executable, *launch, "steps.py", name, *flags, "--accumulate", str(parts)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    one, *others = (torch.load(name) for name in ("one", "two", "parts", "both"))
    start = run_of_digits(flags).model.state_dict()
    assert max((one["model"][name] - start[name]).abs().max() for name in start) > 0.01  # it has learnt
    for other in others:
        assert other["lr"] == one["lr"]
        for part in ("model", "ema"):
            for name, value in one[part].items():
                torch.testing.assert_close(other[part][name], value, atol=1e-9, rtol=0)


def run_of_digits(flags):
    return train.new_run(*train.parse(flags), torch.device("cpu"))


@pytest.mark.slow
def test_an_uneven_set_is_counted_exactly():
    """355 pictures to validate by two processes."""
    assert train.main(["--epochs", "1", "--out", "run", "--device", "cpu", "--depth", "2", "--dim", "48"]) == 0
    row = rows_of("run")[0]
    done = torchrun("--eval", "--weights", "run/best.pt", "--device", "cpu")
    right = round(float(row["val_accuracy"]) * 355)
    assert f"({right} of 355)" in done.stdout and f"loss {float(row['val_loss']):.4f}" in done.stdout, done.stderr


TWO_PLACES = """
import os, sys
from refiner_min import distributed, hardware, run_command
from refiner_min.train import main
def run():
    rank = os.environ["RANK"]
    return main([word.replace("RANK", rank) for word in sys.argv[1:]])
run_command(run)
"""


@pytest.mark.slow
def test_machines_whose_copies_differ_are_told(tmp_path):
    """The first one's listing holds for all; what one of them cannot read is missing there alone."""
    for rank in ("0", "1"):
        make_folder(tmp_path / rank)
    (tmp_path / "1" / "train" / CLASSES[0] / "3.png").write_bytes(b"half")
    (tmp_path / "1" / "train" / CLASSES[1] / "more.png").write_bytes(b"not listed by the first")
    Path("two_places.py").write_text(TWO_PLACES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two_places.py",
               *small(tmp_path / "RANK", "--out", "two", "--batch-size", "4", "--skip-bad")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "error: some processes find 17 pictures and others 18: the machines' copies of " in done.stderr, done.stderr
    assert done.returncode and not Path("two").exists()


@pytest.mark.slow
def test_two_processes_learn_from_maps(pictures, labels):
    flags = ["--batch-size", "12", "--epochs", "1", "--mix-token", "--mixup", "0.8", "--cutmix", "1"]
    done = torchrun(*small(pictures, "--out", "two", "--relabel", labels, *flags))
    assert done.returncode == 0, done.stderr
    state = checkpoint.load("two/last.pt")
    assert state["processes"] == 2 and state["config"]["dense"] and state["annotator"] == "hand at 64 px"
