"""The recorded experiments, run again with one command: python -m refiner_min.study

What the refinement gains, with seeds: each experiment is some flags of refiner_min.train. They are run in the order of
importance in which they stand here, one at a time, and recorded in notebooks/results/ as they end: NAME-seedK.json (the
run's config.json with the experiment's name and the measures of its model) and NAME-seedK.csv (its metrics.csv).
It imports train, annotate and neighbour, whose commands it runs; measures; report, which makes tables of the records;
and label_store, hardware and records.
"""

import argparse
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from refiner_min import UserError, annotate, hardware, measures, neighbour, report, run_command, train, write_json
from refiner_min.label_store import PackedLabels
from refiner_min.records import origin, package_commit

RUNS = Path("runs/study")
RESULTS = Path("notebooks/results")
LABELS = Path("labels/imagenette")
IMAGENETTE = "--subset imagenette --data data/imagenette2-224"
ANNOTATE = f"{IMAGENETTE} --out {LABELS} --resume"
PARTS = {  # of the refinement: what is left of it, and the flags
    "plain": "--no-refine",
    "refined": "",
    "expansion": "--kernel-size 1",
    "convolution": "--expand 1",
    "every-block": "--no-share",
    "linear": "--linear",
}


@dataclass(frozen=True)
class Experiment:
    name: str
    flags: str  # of refiner_min.train, but for --seed, --device and --out
    minutes: float  # expected, of a seed on two cores
    command: str = "train"  # or "neighbour", which has its seeds and its record in itself


@dataclass(frozen=True)
class Group:
    """Experiments that answer one question; seed by seed."""

    question: str
    experiments: list[Experiment]
    seeds: int
    device: str = "cpu"


def experiments(prefix: str, flags: str, minutes: dict[str, float], parts=PARTS) -> list[Experiment]:
    """Those named in minutes."""
    return [Experiment(f"{prefix}-{name}", f"{flags} {parts[name]}".strip(), expected)
            for name, expected in minutes.items()]


SHORT = f"{IMAGENETTE} --validate-every 4"
DEEP = f"{IMAGENETTE} --depth 12"
LONG = f"{IMAGENETTE} --ema 0.998 --warmup-epochs 3 --validate-every 5"
GROUPS = [
    Group("does a deep model learn more with its maps refined?",
          experiments("imagenette-depth12", DEEP, {"plain": 13, "refined": 18}), seeds=3),
    Group("which recipe for many epochs? Chosen on a tenth of the training pictures, held out, not on val/",
          experiments("recipe", f"{LONG} --hold-out 0.1 --epochs 40", {"preset": 50, "cutmix": 50},
                      {"preset": "", "cutmix": "--cutmix 1"}), seeds=1),
    Group("and without cutmix, which costs more in 40 epochs than it gives: twice the rate, or a little mixup?",
          experiments("recipe", f"{LONG} --hold-out 0.1 --epochs 40", {"rate": 50, "mild": 50},
                      {"rate": "--lr 2e-3", "mild": "--mixup 0.2"}), seeds=1),
    Group("how far in 100 epochs, with the recipe that was best there? And normalised: a head start or a better model?",
          experiments("headline-long", f"{LONG} --epochs 100", {"refined": 140, "plain": 105, "normalised": 140},
                      PARTS | {"normalised": "--branch-scale 0"}), seeds=1),
    Group("how far does a small model get from scratch, refined and plain? Its weights come with the package",
          experiments("headline", f"{LONG} --epochs 50 --cutmix 1", {"refined": 70, "plain": 50}), seeds=1),
    Group("which part of the refinement does it, at depth 6; a deeper plain ViT takes the refined one's time; sharing: "
          "maps shared in pairs, not refined; small-branch: what is added to a map begins as large as trained maps, "
          "and not 50 times as large",
          experiments("imagenette-depth6", SHORT, {"plain": 11, "refined": 16, "sharing": 11, "small-branch": 16,
                                                   "deeper": 15, "expansion": 15, "convolution": 15, "every-block": 20,
                                                   "linear": 20},
                      PARTS | {"sharing": "--unrefined", "small-branch": "--branch-scale 0.02",
                               "deeper": "--no-refine --depth 8"}), seeds=3),
    Group("is it what is added to the map at all, at depth 6? normalised: the shared map and its BatchNorm, no branch",
          experiments("imagenette-depth6", SHORT, {"normalised": 15}, {"normalised": "--branch-scale 0"}), seeds=3),
    Group("what token labels add: a token head that learns the picture's label, then label maps, then MixToken",
          experiments("imagenette-tokens", SHORT, {"picture": 16, "maps": 16, "mixtoken": 16},
                      {"picture": "--dense-weight 0.5", "maps": f"--relabel {LABELS}",
                       "mixtoken": f"--relabel {LABELS} --mix-token"}), seeds=3),
    Group("is it what is added to the map, at depth 12, where the published form gains?",
          experiments("imagenette-depth12", DEEP, {"normalised": 17}, {"normalised": "--branch-scale 0"}), seeds=3),
    Group("which part does it, at depth 12; a deeper plain ViT takes the refined one's time",
          experiments("imagenette-depth12", DEEP, {"sharing": 12, "deeper": 18, "expansion": 17, "convolution": 17,
                                                   "every-block": 22},
                      PARTS | {"sharing": "--unrefined", "deeper": "--no-refine --depth 17"}), seeds=3),
    Group("is it the size of the refined maps, at depth 12? They begin as small as trained maps are unrefined; where "
          "every block refines its own, as small as those of the pairs",
          experiments("imagenette-depth12", DEEP, {"normalised-small": 17, "every-block-small": 22},
                      {"normalised-small": "--branch-scale 0 --map-scale 0.1",
                       "every-block-small": "--no-share --map-scale 0.144"}), seeds=3),
    Group("which part does it where a token's label depends on its neighbours",
          experiments("scenes", "--subset digit-scenes", dict.fromkeys((*PARTS, "deeper"), 1.5),
                      PARTS | {"deeper": "--no-refine --depth 8"}), seeds=5),
    Group("the mechanism alone: what one refined block does, and how many plain ones it takes",
          [Experiment("neighbour", "", 45, command="neighbour")], seeds=1),
    Group("with half or twice the learning rate, at depth 6?",
          [experiment for lr in ("5e-4", "2e-3") for experiment in
           experiments(f"imagenette-depth6-lr{lr}", f"{SHORT} --lr {lr}", {"plain": 11, "refined": 16})],
          seeds=1),
    Group("with fewer or more heads?",
          [experiment for heads in (2, 8) for experiment in
           experiments(f"imagenette-depth12-heads{heads}", f"{SHORT} --depth 12 --heads {heads}",
                       {"plain": 14, "refined": 19})],
          seeds=1),
    Group("deeper still, at a smaller width?",
          experiments("imagenette-depth24", f"{SHORT} --depth 24 --dim 128", {"plain": 20, "refined": 30}),
          seeds=1),
    Group("the parts at 128 px, on a GPU",
          experiments("imagenette-128px", IMAGENETTE, dict.fromkeys(PARTS, 10)), seeds=3, device="cuda"),
    Group("how far does S get from scratch at 128 px, on a GPU? CNNs come to 94.2 % in as many epochs (fastai's table)",
          experiments("headline-128px", f"{IMAGENETTE} --model s --epochs 200", {"refined": 60, "plain": 50}), seeds=1,
          device="cuda"),
]


@dataclass(frozen=True)
class Planned:
    """One run of an experiment."""

    experiment: Experiment
    seed: int
    device: str

    @property
    def name(self) -> str:
        return self.experiment.name + ("" if self.experiment.command == "neighbour" else f"-seed{self.seed}")

    @property
    def out(self) -> Path:
        return RUNS / self.name

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def arguments(self) -> list[str]:
        """Of refiner_min.train: to begin, or to go on."""
        if (self.out / "last.pt").exists() or (self.out / "last.backup.pt").exists():
            return ["--resume", str(self.out), "--device", self.device]
        return [*self.experiment.flags.split(), "--device", self.device, "--seed", str(self.seed),
                "--out", str(self.out), "--no-compile"]  # so that no row of a table is and another is not


def plan() -> list[Planned]:
    """All runs, in the order of importance."""
    return [Planned(experiment, seed, group.device)
            for group in GROUPS for seed in range(group.seeds) for experiment in group.experiments]


def choose(only: list[str] | None) -> list[Planned]:
    """The runs of these experiments, or these runs, recorded or not; if none is named, those that are not recorded.
    UserError: a name of none."""
    runs = plan()
    if not only:
        return [run for run in runs if not run.record.exists()]
    known = {name for run in runs for name in (run.name, run.experiment.name)}
    for name in only:
        if name not in known:
            raise UserError(f"--only {name} is no experiment: --list names them")
    return [run for run in runs if run.name in only or run.experiment.name in only]


# ----------------------------------------------------------------------------------------------------------------------
# Running


def run_all(runs: list[Planned], until: float = math.inf) -> int:
    """Run and record one after the other, and begin nothing after until (time.monotonic's). Returns 0, or the exit
    status of what was stopped."""
    package_commit()  # now: of the code that all of them run
    for run in runs:
        if run.device == "cuda" and not torch.cuda.is_available():
            print(f"{run.name}: not run, it wants a GPU")
            continue
        if run.record.exists() and finished(run):
            print(f"{run.name}: not run again, it is in {run.out}: remove that folder first", flush=True)
            add_measures(run)
            continue
        print(f"\n{run.name}", flush=True)
        for part in (make_labels, train_to_the_end):
            if time.monotonic() >= until:  # SIGTERM came in the last step of what was before
                return 128 + signal.SIGTERM
            if status := part(run):
                return status
        record(run)
    return 0


def make_labels(run: Planned) -> int:
    """The label maps that the run learns from, where they are wanted and not there. Returns the exit status."""
    if "--relabel" not in run.experiment.flags or labels_are_made():
        return 0
    return annotate.main(ANNOTATE.split())


def labels_are_made() -> bool:
    if not (LABELS / PackedLabels.FACTS).exists():
        return False
    written, names = PackedLabels.describe(LABELS)
    return written["done"] == len(names)


def finished(run: Planned) -> bool:
    """Whether its folder holds all of a training run."""
    config = run.out / "config.json"
    return config.exists() and "result" in json.loads(config.read_text())


def train_to_the_end(run: Planned) -> int:
    """Begin the run or go on with it. Returns the command's exit status."""
    if run.experiment.command == "neighbour":
        return neighbour.main(["--out", str(run.out)])
    if finished(run):
        return 0
    arguments = run.arguments()
    if arguments[0] != "--resume":
        shutil.rmtree(run.out, ignore_errors=True)  # of a run that was killed before its first checkpoint
    return train.main(arguments)


def record(run: Planned):
    """Measure the run's model and write its record; where there is one already, say how far this run is from it."""
    if run.experiment.command == "neighbour":
        if run.record.exists():
            print(f"{run.out}/neighbour.csv: the record in {RESULTS} stays as it is")
        else:
            shutil.copytree(run.out, RESULTS, dirs_exist_ok=True)
        return
    made = json.loads((run.out / "config.json").read_text())
    accuracy = made["result"]["accuracy"]
    if run.record.exists():
        before = json.loads(run.record.read_text())["result"]["accuracy"]
        print(f"{run.name}: accuracy {accuracy:.2%}, recorded {before:.2%}: {100 * (accuracy - before):+.2f} points; "
              f"the record stays as it is")
        return
    measured = measures.measure_run(run.out, hardware.choose_device(run.device))
    found = made | {"experiment": run.experiment.name, "measures": measured}
    shutil.copyfile(run.out / "metrics.csv", run.record.with_suffix(".csv"))
    write_json(run.record, found)
    print(f"{run.name}: accuracy {accuracy:.2%}, recorded in {run.record}", flush=True)


def add_measures(run: Planned):
    """To the record of a run whose folder is here still: those that it was made without, an earlier commit's."""
    made, found = (json.loads(path.read_text()) for path in (run.out / "config.json", run.record))
    if made["result"] != found["result"]:  # of a later run: not the model that is recorded
        return
    measured = measures.measure_run(run.out, hardware.choose_device(run.device))
    added = {name: value for name, value in measured.items() if name not in found["measures"]}
    if added:
        found["measures"] |= added
        found["measures_added"] = {"names": sorted(added), "commit": package_commit()}
        write_json(run.record, found)
        print(f"{run.name}: added to {run.record}: {', '.join(sorted(added))}", flush=True)


def measure_speed(steps: int = 5, rounds: int = 9) -> dict:
    """Images a second in training of every experiment whose device is here: the median over rounds, in each of which
    every one has its turn of some steps. Meant for a machine on which nothing else runs."""
    here = {group.device for group in GROUPS if group.device == "cpu" or torch.cuda.is_available()}
    wanted = [(experiment, group.device) for group in GROUPS if group.device in here for experiment in group.experiments
              if experiment.command == "train" and ("--relabel" not in experiment.flags or labels_are_made())]
    with tempfile.TemporaryDirectory() as folder:
        runs, held, seconds = {}, {}, {experiment.name: [] for experiment, _ in wanted}
        for experiment, device in wanted:
            words = [*experiment.flags.split(), "--device", device, "--out", f"{folder}/{experiment.name}",
                     "--no-compile"]  # as they are run
            with redirect_stdout(io.StringIO()):
                run = train.new_run(*train.parse(words), hardware.choose_device(device))
            pictures = run.subset.name, run.subset.relabel, run.recipe.img_size, run.recipe.hold_out
            run.subset = held.setdefault(pictures, run.subset)  # in memory once
            runs[experiment.name] = run
        for _ in tqdm(range(rounds + 1), "measuring", disable=None):
            for name, run in runs.items():
                seconds[name].append(seconds_of(run, steps))
    speed = {name: runs[name].recipe.batch_size * steps / statistics.median(found[1:])  # the first one warms up
             for name, found in seconds.items()}
    device = torch.device("cuda" if "cuda" in here else "cpu")
    return {"command": "python -m refiner_min.study --speed", **origin(device),
            "images_per_second": {name: round(value, 1) for name, value in speed.items()}}


def seconds_of(run, steps: int) -> float:
    """Of so many steps of training, from the reading of the batch to the average of the weights."""
    run.wrapped.train()
    indices = run.order(0)[: steps * run.local_batch]
    started = time.perf_counter()
    for batch in run.subset.train.epoch(indices, run.local_batch):
        run.train_batch(batch)
    run.loss.mean()  # waits for the device
    return time.perf_counter() - started


def stop_after(minutes: float) -> threading.Timer:
    """Send this process SIGTERM by then: training saves and stops, as it does for a scheduler."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    return timer


def on_sigterm(number, frame):
    """Outside of training."""
    sys.exit(128 + number)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def listing() -> str:
    """Every experiment: seeds that are recorded and missing, the minutes that those are expected to take."""
    lines = []
    for group in GROUPS:
        lines.append(f"\n{group.question} ({group.device})")
        for experiment in group.experiments:
            runs = [Planned(experiment, seed, group.device) for seed in range(group.seeds)]
            done, missing = ([str(run.seed) for run in runs if run.record.exists() is there] for there in (True, False))
            minutes = f", about {len(missing) * experiment.minutes:.0f} minutes" if missing else ""
            lines.append(f"  {experiment.name}: {experiment.flags}")
            lines.append(f"    seeds done: {' '.join(done) or 'none'}; missing: {' '.join(missing) or 'none'}{minutes}")
    return "\n".join(lines).strip()


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.study", description="Run the experiments that are "
                                     "not recorded yet, the most important first.")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and stop")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so many; the next start goes on")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these experiments, or these runs (NAME-seedK), "
                        "and say how far they are from what is recorded of them")
    parser.add_argument("--report", action="store_true", help=f"write {RESULTS}/study.md and its pictures from what is "
                        "recorded, and stop")
    parser.add_argument("--speed", action="store_true", help=f"measure the images a second of every experiment, with "
                        f"nothing beside it (half an hour, 16 GB): {RESULTS}/{report.SPEED}, and stop")
    args = parser.parse_args(arguments)
    if args.minutes is not None and not 0 < args.minutes <= 10**6:  # nan is neither
        raise UserError(f"--minutes {args.minutes:g} must be above 0 and at most 1000000")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    if args.list:
        print(listing())
        return 0
    if not RESULTS.is_dir():
        raise UserError(f"there is no folder {RESULTS} here: run it in the project's folder")
    if args.speed:
        write_json(RESULTS / report.SPEED, measure_speed())
        print(f"written: {RESULTS / report.SPEED}")
        return 0
    if args.report:
        report.write(RESULTS)
        print(f"written: {RESULTS}/study.md and its pictures")
        return 0
    runs, before = choose(args.only), signal.signal(signal.SIGTERM, on_sigterm)
    timer = stop_after(args.minutes) if args.minutes else None
    try:
        return run_all(runs, time.monotonic() + 60 * args.minutes if args.minutes else math.inf)
    finally:
        if timer is not None:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)
    run_command(main)
