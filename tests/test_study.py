"""study.py: what is missing is run in order, stopped and gone on with, recorded once; the list says so."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refiner_min import UserError, checkpoint, study, train
from refiner_min.records import package_commit
from refiner_min.study import Experiment, Group, Planned
from tests.runs import SMALL, rows_of

ROOT = Path(__file__).parents[1]
EXPERIMENTS = [experiment for group in study.GROUPS for experiment in group.experiments]


@pytest.fixture
def toys(pictures, monkeypatch):
    """Two groups of small runs in the place of the study's; the folder to record in."""
    flags = " ".join(["--subset folder --data", str(pictures), *SMALL[:-2]])  # without the device
    monkeypatch.setattr(study, "GROUPS", [
        Group("first", [Experiment("plain", f"{flags} --no-refine", 2), Experiment("refined", flags, 3)], seeds=2),
        Group("second", [Experiment("linear", f"{flags} --linear", 4)], seeds=1),
        Group("elsewhere", [Experiment("gpu", flags, 5)], seeds=1, device="cuda")])
    study.RESULTS.mkdir(parents=True)
    return study.RESULTS


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_missing_is_run_in_order_and_recorded(toys, capsys, monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    assert study.main([]) == 0
    shown = capsys.readouterr().out
    order = ["plain-seed0", "refined-seed0", "plain-seed1", "refined-seed1", "linear-seed0"]
    assert [line for line in shown.splitlines() if line in order] == order
    assert "gpu-seed0: not run, it wants a GPU" in shown
    assert names(toys) == sorted(f"{name}.{kind}" for name in order for kind in ("csv", "json"))
    for name in order:
        record, run = json.loads((toys / f"{name}.json").read_text()), study.RUNS / name
        made = json.loads((run / "config.json").read_text())
        assert {key: record[key] for key in made} == made and record.keys() - made.keys() == {"experiment", "measures"}
        assert record["experiment"] == name.split("-")[0] and record["recipe"]["seed"] == int(name[-1])
        assert (toys / f"{name}.csv").read_bytes() == (run / "metrics.csv").read_bytes()
        assert record["measures"]["accuracy"] == round(record["result"]["accuracy"], 4)  # of what was evaluated last
    study.main([])
    assert "training" not in capsys.readouterr().out


def test_a_study_that_was_stopped_goes_on_and_ends_alike(toys, tmp_path, monkeypatch):
    def stop(run, *rest):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    step = train.Run.train_step
    monkeypatch.setattr(train.Run, "train_step", stop)
    assert study.main(["--only", "plain-seed0"]) == 128 + signal.SIGTERM
    assert not list(toys.iterdir()) and checkpoint.load(study.RUNS / "plain-seed0" / "last.pt")["step"] == 3
    monkeypatch.setattr(train.Run, "train_step", step)
    assert study.main(["--only", "plain-seed0"]) == 0
    assert names(toys) == ["plain-seed0.csv", "plain-seed0.json"]
    experiment = Planned(study.GROUPS[0].experiments[0], 0, "cpu")
    train.main([*experiment.experiment.flags.split(), "--device", "cpu", "--seed", "0", "--out", "whole"])
    assert rows_of("whole") == rows_of(experiment.out)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(toys):
    out = study.RUNS / "linear-seed0"
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    assert study.main(["--only", "linear"]) == 0
    assert names(toys) == ["linear-seed0.csv", "linear-seed0.json"]


def test_a_repeated_run_is_compared_and_its_record_kept(toys, capsys):
    study.main(["--only", "linear"])
    record = toys / "linear-seed0.json"
    facts = json.loads(record.read_text())
    facts["result"]["accuracy"] += 0.25
    record.write_text(json.dumps(facts))
    capsys.readouterr()
    assert study.main(["--only", "linear-seed0"]) == 0  # nothing is compared with itself
    assert capsys.readouterr().out == (
        "linear-seed0: not run again, it is in runs/study/linear-seed0: remove that folder first\n")
    shutil.rmtree(study.RUNS)
    assert study.main(["--only", "linear-seed0"]) == 0
    shown = capsys.readouterr().out
    assert ": -25.00 points; the record stays as it is" in shown and json.loads(record.read_text()) == facts


def test_measures_that_a_record_was_made_without_are_added(toys, capsys):
    study.main(["--only", "linear"])
    record = toys / "linear-seed0.json"
    whole = json.loads(record.read_text())
    lacking = dict(whole, measures={name: value for name, value in whole["measures"].items() if name != "gain"})
    lacking["measures"]["accuracy"] = 0.123  # what is there is left as it is
    record.write_text(json.dumps(lacking))
    assert study.main(["--only", "linear-seed0"]) == 0
    assert f"linear-seed0: added to {study.RESULTS}/linear-seed0.json: gain\n" in capsys.readouterr().out
    added = {"names": ["gain"], "commit": whole["commit"]}
    assert json.loads(record.read_text()) == lacking | {
        "measures": lacking["measures"] | {"gain": whole["measures"]["gain"]}, "measures_added": added}
    lacking["result"]["accuracy"] = 0.321  # of another run than the one that is in the folder
    for facts in (json.loads(record.read_text()), lacking):
        record.write_text(json.dumps(facts))
        assert study.main(["--only", "linear-seed0"]) == 0
        assert "added" not in capsys.readouterr().out and json.loads(record.read_text()) == facts


def test_the_list_says_what_is_done_and_what_is_missing(toys, capsys):
    for seed in (0, 1):
        (toys / f"plain-seed{seed}.json").write_text("{}")
    (toys / "refined-seed1.json").write_text("{}")
    study.main(["--list"])
    shown = capsys.readouterr().out
    assert "seeds done: 0 1; missing: none\n" in shown
    assert "seeds done: 1; missing: 0, about 3 minutes\n" in shown
    assert "seeds done: none; missing: 0, about 4 minutes\n" in shown
    for group in study.GROUPS:
        assert group.question in shown and all(experiment.flags in shown for experiment in group.experiments)


def test_mistakes_are_told(toys):
    with pytest.raises(UserError, match="--only other is no experiment: --list names them"):
        study.main(["--only", "plain", "other"])
    for minutes in ("nan", "inf", "1e308"):
        with pytest.raises(UserError, match="--minutes .* must be above 0 and at most 1000000"):
            study.parse(["--minutes", minutes])
    with pytest.raises(UserError, match="--minutes 0 must be above 0"):
        study.main(["--minutes", "0"])
    toys.rename("elsewhere")
    with pytest.raises(UserError, match="there is no folder notebooks/results here"):
        study.main([])


def test_the_minutes_end_it_inside_and_outside_of_training(toys):
    """In a process of its own, which signals may end."""
    code = ("import signal, time; from refiner_min import study; signal.signal(signal.SIGTERM, study.on_sigterm); "
            "study.stop_after(1 / 600); time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True)
    assert done.returncode == 128 + signal.SIGTERM and not done.stderr


def test_nothing_is_begun_once_the_minutes_are_used_up(toys, monkeypatch):
    """A run that is asked to stop in its last step is at its end, and says nothing of it."""
    begun, recorded = [], []
    monkeypatch.setattr(study, "train_to_the_end", lambda run: begun.append(run.name) or time.sleep(0.2) or 0)
    monkeypatch.setattr(study, "record", lambda run: recorded.append(run.name))
    assert study.run_all(study.choose(["plain"]), time.monotonic() + 0.1) == 128 + signal.SIGTERM
    assert begun == recorded == ["plain-seed0"]


def test_labels_are_made_first_where_a_run_wants_them(toys, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "GROUPS", [Group("maps", [Experiment("maps", "--relabel labels/imagenette", 1)], 1)])
    monkeypatch.setattr(study.annotate, "main", asked.append)
    monkeypatch.setattr(study, "train_to_the_end", lambda run: 143)
    assert study.main([]) == 143 and asked == [study.ANNOTATE.split()]
    study.LABELS.mkdir(parents=True)
    (study.LABELS / "pictures.txt").write_text("a/1\n")
    facts = dict(annotator="hand", size=64, classes=["a", "b"], shape=[1, 1, 1], done=1, skipped=[])
    (study.LABELS / "labels.json").write_text(json.dumps(facts))
    assert study.main([]) == 143 and len(asked) == 1


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_experiments_are_commands(experiment):
    assert [other.name for other in EXPERIMENTS].count(experiment.name) == 1 and experiment.minutes > 0
    args, given = train.parse([*experiment.flags.split(), "--device", "cpu"])
    if experiment.command == "neighbour":
        return
    assert args.subset in ("imagenette", "digit-scenes") and "seed" not in given and args.out is None


def test_the_records_are_those_of_the_list():
    """Each record of an experiment was made by its flags."""
    for group in study.GROUPS:
        for experiment in group.experiments:
            for seed in range(group.seeds):
                run = Planned(experiment, seed, group.device)
                path = ROOT / run.record
                if path.exists() and experiment.command == "train":
                    facts = json.loads(path.read_text())
                    command = f"python -m refiner_min.train {' '.join(run.arguments())}"
                    older = "compiled" not in facts  # when no run was, unless it was said
                    assert facts["command"] == (command.removesuffix(" --no-compile") if older else command)
                    with open(path.with_suffix(".csv")) as file:
                        last = list(csv.DictReader(file))[-1]
                    assert float(last["val_accuracy"]) == facts["result"]["accuracy"]


def test_the_neighbours_are_recorded_too(toys, monkeypatch, capsys):
    monkeypatch.setattr(study, "GROUPS", [Group("alone", [Experiment("neighbour", "", 1, command="neighbour")], 1)])
    monkeypatch.setattr(study.neighbour, "RUNS", [("right", "plain", 1, 20)])
    assert study.main([]) == 0
    assert names(toys) == ["neighbour.csv", "neighbour.json"]
    study.main(["--list"])
    assert "seeds done: 0; missing: none" in capsys.readouterr().out
    before = (toys / "neighbour.csv").read_text()
    shutil.rmtree(study.RUNS)
    assert study.main(["--only", "neighbour"]) == 0
    assert (toys / "neighbour.csv").read_text() == before
    assert "neighbour.csv: the record in notebooks/results stays as it is" in capsys.readouterr().out


def test_the_speed_of_every_experiment_is_measured_in_turn(toys, monkeypatch):
    turns, tried, held = [], [], []
    timed = study.seconds_of
    monkeypatch.setattr("refiner_min.compiling.step_seconds", tried.append)
    monkeypatch.setattr("refiner_min.compiling.MANY", 0)  # no run is too short to be compiled
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(study, "seconds_of", lambda run, steps: (
        turns.append(run.out.name), held.append(run.subset), timed(run, steps))[-1])
    monkeypatch.setattr(study.measure_speed, "__defaults__", (2, 3))
    assert study.main(["--speed"]) == 0
    assert turns == ["plain", "refined", "linear"] * 4 and not tried
    assert all(subset is held[0] for subset in held)  # their pictures are in memory once
    speed = json.loads((toys / "study-speed.json").read_text())
    assert speed["images_per_second"].keys() == {"plain", "refined", "linear"}
    assert all(value > 0 for value in speed["images_per_second"].values())
    assert speed["hardware"] and speed["commit"] == package_commit() and not study.RUNS.exists()


def test_the_time_of_steps_is_that_of_training(toys, monkeypatch):
    """Two steps of ten pictures in one second are 20 images a second."""
    clock = iter(range(1000))
    monkeypatch.setattr(study.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(study, "GROUPS", study.GROUPS[1:2])
    assert study.measure_speed(steps=2, rounds=3)["images_per_second"] == {"linear": 20.0}
