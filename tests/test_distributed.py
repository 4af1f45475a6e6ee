"""distributed.py: two processes on this machine train one run together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refiner_min import UserError, checkpoint, train
from tests.runs import rows_of, run_of, small


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "refiner_min.train", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes(pictures):
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
    with pytest.raises(UserError, match=r"processes \(2 there, 1 here\)"):
        train.main(["--resume", "two", "--device", "cpu"])


@pytest.mark.slow
def test_two_processes_learn_from_maps(pictures, labels):
    flags = ["--batch-size", "12", "--epochs", "1", "--mix-token", "--mixup", "0.8", "--cutmix", "1"]
    done = torchrun(*small(pictures, "--out", "two", "--relabel", labels, *flags))
    assert done.returncode == 0, done.stderr
    state = checkpoint.load("two/last.pt")
    assert state["processes"] == 2 and state["config"]["dense"] and state["annotator"] == "hand at 64 px"
