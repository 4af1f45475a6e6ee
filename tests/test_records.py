"""records.py: what a run's folder tells people is what the run was."""

import csv
import json
import subprocess
from pathlib import Path

import torch

from refiner_min import hardware, records, write_json
from tests.runs import CPU, run_of

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
    assert records.package_commit() is None
