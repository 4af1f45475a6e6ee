"""What tests of runs share: a small run's flags, the run itself, and the comparison of two."""

import csv
import itertools
import os
import signal
from pathlib import Path

import torch

from refiner_min import checkpoint, train
from refiner_min.engine import Run

CPU = torch.device("cpu")

SMALL = ["--img-size", "16", "--epochs", "2", "--batch-size", "10", "--warmup-epochs", "1", "--device", "cpu"]

NUMBERS = itertools.count()

TIMES = ("seconds", "images_per_second")


def small(pictures, *flags) -> list[str]:
    return ["--subset", "folder", "--data", str(pictures), *SMALL, *flags]


def run_of(pictures, *flags) -> Run:
    arguments = small(pictures, "--out", f"out{next(NUMBERS)}", *flags)
    run = train.new_run(*train.parse(arguments), CPU)
    run.out.mkdir()
    return run


def stop_at(monkeypatch, step: int):
    """Send this process SIGTERM in that step of every run."""
    train_step = Run.train_step

    def stopped(run, *words):
        if run.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(run, *words)

    monkeypatch.setattr(Run, "train_step", stopped)


def rows_of(out) -> list[dict]:
    with open(Path(out) / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_runs(one, two):
    """Metrics but for times, and every tensor of the checkpoint."""
    assert rows_of(one) == rows_of(two)
    first, second = (checkpoint.load(Path(out) / "last.pt") for out in (one, two))
    for part in ("model", "ema"):
        assert (first[part] is None) == (second[part] is None)
        for name, value in (first[part] or {}).items():
            assert torch.equal(value, second[part][name]), name
