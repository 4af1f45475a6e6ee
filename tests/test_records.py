"""records.py: what a run's folder tells people is what the run was."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refiner_min import UserError, engine, hardware, records, splits, train, write_json
from refiner_min.relabel import Labels
from refiner_min.step import LossWatch
from tests.runs import CPU, run_of, small

ROWS = [{"epoch": epoch, "step": 10 * epoch, "lr": 0.001, "train_loss": 2.0 / epoch, "val_loss": 1.0 / epoch,
         "val_accuracy": accuracy, "seconds": 60.0, "images_per_second": speed}
        for epoch, accuracy, speed in ((1, 0.5, 90.0), (2, 0.75, 100.0), (3, 0.75, 110.0), (4, 0.7, 50.0))]


def test_the_table_and_metrics_say_the_same():
    records.write_history(Path(), ROWS, "a run")
    with open("metrics.csv") as file:
        found = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in found] == ROWS
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    row = records.table_row(ROWS[1])
    assert len(records.HEADER) == len(row)  # the columns end where their headings do
    for value in ("2", "20", "0.001", "1.0000", "0.5000", "75.00%", "60", "100"):
        assert value in row.split()
    assert records.table_row(ROWS[1] | {"val_token_accuracy": 0.25}).endswith("of tokens 25.00%")


def test_results_are_the_last_epochs_and_the_latest_best():
    found = records.results(ROWS, averaged=True)
    assert found == {"training_minutes": 4.0, "images_per_second": 95.0, "accuracy": 0.7, "best_accuracy": 0.75,
                     "best_epoch": 3, "weights": "EMA"}
    last = [row | {"val_token_accuracy": 0.1 * row["epoch"]} for row in ROWS]
    found = records.results(last, averaged=False)
    assert (found["weights"], found["token_accuracy"]) == ("last", 0.4)


def test_the_command_is_as_one_would_type_it(monkeypatch):
    assert records.command_line([]) == "python -m refiner_min.train"
    assert records.command_line(["--data", "my pictures"]) == "python -m refiner_min.train --data 'my pictures'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert records.command_line(["--seed", "1"]) == "torchrun --nproc-per-node 2 -m refiner_min.train --seed 1"


def test_facts_name_the_machine_the_versions_and_the_commit(pictures, monkeypatch):
    run = run_of(pictures)
    facts = records.facts(run, ["--seed", "1"])
    assert (facts["subset"], facts["parameters"]) == ("folder", run.parameters)
    assert facts["command"].endswith("--seed 1")
    assert facts["versions"]["torch"] == torch.__version__ and facts["hardware"] == hardware.describe(CPU)
    assert facts["settings"] == {"tf32": False, "tf32_in_evaluation": False, "cudnn_benchmark": False,
                                 "channels_last": False}
    write_json("config.json", facts)
    assert json.loads(Path("config.json").read_text()) == json.loads(json.dumps(facts))

    def no_git(*words, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    records.package_commit.cache_clear()
    assert records.package_commit() is None
    records.package_commit.cache_clear()


def test_the_commit_is_that_of_the_package_and_says_when_it_is_not_clean(monkeypatch):
    """What stands in the process was read when it began: it does not change with the folder."""
    said = {"log": "c" * 40 + "\n", "status": ""}
    monkeypatch.setattr(subprocess, "run", lambda words, **options: SimpleNamespace(stdout=said[words[1]]))
    records.package_commit.cache_clear()
    assert records.package_commit() == "c" * 40
    said["status"] = " M model.py\n"
    assert records.package_commit() == "c" * 40
    records.package_commit.cache_clear()
    assert records.package_commit() == "c" * 40 + "-dirty"
    said["log"] = ""  # no repository
    records.package_commit.cache_clear()
    assert records.package_commit() is None
    records.package_commit.cache_clear()


def steps_of(out) -> list[dict]:
    with open(Path(out) / "steps.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_line_each_so_many_steps(pictures, monkeypatch):
    """Of the steps since the line before, also where an epoch ends between the two; evaluation is not counted."""
    losses, add, evaluate = [], LossWatch.add, engine.Run.evaluate
    monkeypatch.setattr(LossWatch, "add", lambda watch, loss, *words: (
        losses.append(float(loss.detach())), add(watch, loss, *words)))
    monkeypatch.setattr(engine.Run, "evaluate", lambda *words: (time.sleep(0.5), evaluate(*words))[1])
    assert train.main(small(pictures, "--out", "run", "--batch-size", "8", "--log-every", "2", "--epochs", "4")) == 0
    rows = steps_of("run")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]  # epochs of three steps
    assert [row["epoch"] for row in rows] == [0.667, 1.333, 2, 2.667, 3.333, 4]
    for row, expected in zip(rows, [losses[:2], losses[3:4], losses[4:6], losses[6:8], losses[9:10], losses[10:12]]):
        assert row["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert 0 <= row["waited"] <= row["seconds"] < 0.5 and row["seconds"] > 0
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"], rel=0.6)  # which are rounded
        assert 0.1 < row["memory_gb"] < 30
    with open("run/metrics.csv") as file:
        lr = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rows[2]["lr"] == lr[1] and rows[5]["lr"] == lr[3]
    assert train.main(small(pictures, "--out", "none", "--log-every", "0")) == 0 and not Path("none/steps.csv").exists()


def test_waiting_for_the_data_is_seen(pictures, monkeypatch):
    epoch = splits.MemorySplit.epoch
    monkeypatch.setattr(splits.MemorySplit, "epoch", lambda split, *words: (
        (time.sleep(0.1), batch)[1] for batch in epoch(split, *words)))
    assert train.main(small(pictures, "--out", "run", "--batch-size", "8", "--log-every", "3")) == 0
    for row in steps_of("run"):
        assert 0.3 <= row["waited"] < row["seconds"]


def test_a_run_that_goes_on_writes_no_step_twice(pictures):
    """Lines of steps after the checkpoint, and half a line, were written before the run was killed."""
    flags = ["--batch-size", "8", "--log-every", "2"]
    assert train.main(small(pictures, "--out", "run", *flags)) == 0
    lines = Path("run/steps.csv").read_text().splitlines()
    Path("run/steps.csv").write_text("\n".join([*lines, "8" + lines[-1][1:], "10,3.333"]))
    run = run_of(pictures, *flags)
    run.out, run.step = Path("run"), 5
    log = records.StepLog(run, 2)
    assert Path("run/steps.csv").read_text().splitlines() == lines[:3]  # the header, steps 2 and 4
    run.train_step(torch.zeros(8, 3, 16, 16), Labels(torch.zeros(8, dtype=torch.long)))
    log.note()
    assert [row["step"] for row in steps_of("run")] == [2, 4, 6]


def test_tensorboard_is_told_the_same(pictures, monkeypatch):
    told, made = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((str(folder), purge_step))

        def add_scalar(self, *words):
            told.append(words)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert train.main(small(pictures, "--out", "run", "--log-every", "2", "--tensorboard")) == 0
    assert made == [("run/tensorboard", 1)]
    for row in steps_of("run"):
        assert ("steps/images_per_second", row["images_per_second"], row["step"]) in told
    assert {words[2] for words in told if words[0] == "epochs/val_accuracy"} == {2, 4}
    assert len({words[::2] for words in told}) == len(told)  # of one name, one number a step
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs a package: pip install tensorboard"):
        train.main(small(pictures, "--out", "other", "--tensorboard"))
    assert not Path("other").exists()
