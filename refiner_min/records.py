"""What a run leaves for people in its folder: config.json, metrics.csv, curves.png and steps.csv; and its table on the
screen.

What it leaves to go on from is engine.Run.state, written by checkpoint. It imports distributed, hardware and plots.
"""

import json
import platform
import shlex
import statistics
import subprocess
import time
from functools import cache
from pathlib import Path

import torch
import torchvision

from refiner_min import UserError, __version__, distributed, hardware, replacing, write_json

HEADER = "epoch     step    next lr train loss  val loss accuracy seconds    img/s"
TABLE = ("{epoch:>5} {step:>8} {lr:>10.3g} {train_loss:>10.4f} {val_loss:>9.4f} {val_accuracy:>8.2%} {seconds:>7.0f} "
         "{images_per_second:>8.0f}")
ROW = ("epoch", "step", "lr", "train_loss", "val_loss", "val_accuracy", "seconds", "images_per_second")  # and more


def table_row(row: dict) -> str:
    tokens = f"  of tokens {row['val_token_accuracy']:.2%}" if "val_token_accuracy" in row else ""
    return TABLE.format(**row) + tokens


def command_line(arguments: list[str]) -> str:
    """The command with these arguments, as one would type it."""
    return f"{distributed.launcher('refiner_min.train')} {shlex.join(arguments)}".strip()


def write_history(out: Path, history: list[dict], title: str):
    """metrics.csv and curves.png, anew from the history, so that they never disagree with the checkpoint. UserError:
    they cannot be written."""
    from refiner_min import plots  # here, so that what draws nothing does without matplotlib

    lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
    with replacing(out / "metrics.csv") as file:
        file.write("\n".join([*lines, ""]).encode())
    plots.save_figure(plots.training_curves(history, title), out / "curves.png")


class StepLog:
    """steps.csv: a line each so many steps, by which a run of days can be watched; and the same for TensorBoard. Of
    several processes the first one writes, the speed of all, and its own loss, waiting and memory.

    A line is of the steps since the line before, without evaluation. loss: the mean a picture, at the earliest since
    the last validation. waited: seconds for data, of the seconds. memory_gb: the largest so far, of the GPU or the
    process.
    """

    FIELDS = ("step", "epoch", "loss", "lr", "images_per_second", "seconds", "waited", "memory_gb")

    def __init__(self, run, every: int = 0, tensorboard: bool = False):
        """Goes on where the run does: lines of later steps, of a run that was killed, are dropped. every: 0 for none.
        UserError: TensorBoard is not installed, or nothing can be written."""
        self.run, self.every, self.path = run, every if distributed.is_main() else 0, run.out / "steps.csv"
        self.board = None
        if tensorboard and distributed.is_main():
            self.board = board_writer()(run.out / "tensorboard", purge_step=run.step + 1)
        self.start()
        if self.every:
            there = self.path.read_text(errors="replace").splitlines()[1:] if self.path.is_file() else []
            kept = [line for line in there if line.count(",") == len(self.FIELDS) - 1
                    and (step := line.split(",")[0]).isdecimal() and int(step) <= run.step]
            with replacing(self.path) as file:
                file.write("\n".join([",".join(self.FIELDS), *kept, ""]).encode())

    def start(self):
        self.step, self.since, self.seconds, self.waited = self.run.step, time.perf_counter(), 0.0, 0.0

    def timed(self, batches):
        """The batches of an epoch, while it is counted how long it takes and how long each is waited for."""
        self.since = asked = time.perf_counter()
        try:
            for batch in batches:
                self.waited += time.perf_counter() - asked
                yield batch
                asked = time.perf_counter()
        finally:
            self.seconds += time.perf_counter() - self.since

    def note(self):
        """Write the line that is due after this step, if one is. UserError: it cannot be written."""
        run = self.run
        if not self.every or run.step % self.every:
            return
        seconds = self.seconds + time.perf_counter() - self.since
        speed = (run.step - self.step) * run.recipe.batch_size / seconds
        row = dict(zip(self.FIELDS, (
            run.step, round(run.step / run.steps_per_epoch, 3), run.loss.recent(), run.scheduler.get_last_lr()[0],
            round(speed, 1), round(seconds, 2), round(self.waited, 2),
            round(hardware.peak_memory(run.device) / 1e9, 3))))
        self.show("steps", row)
        try:
            with open(self.path, "a") as file:
                file.write(",".join(map(str, row.values())) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} could not be written ({error}); --resume {run.out} goes on when it can "
                            f"be") from None
        self.start()

    def show(self, of: str, row: dict):
        """Numbers at a step to TensorBoard, if it is wanted; of: "steps" since the line before, or "epochs"."""
        if self.board is not None:
            for name in set(row) - {"step", "epoch"}:
                self.board.add_scalar(f"{of}/{name}", row[name], row["step"])
            self.board.flush()


def board_writer():
    """What writes for TensorBoard. UserError: it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def begin(run, arguments: list[str]):
    """Write config.json of a run at its start."""
    write_json(run.out / "config.json", facts(run, arguments))


def facts(run, arguments: list[str]) -> dict:
    """What config.json says of an engine.Run from the start: enough to run it again and to compare it."""
    return {
        "command": command_line(arguments),
        **run.origin(),
        "parameters": run.parameters,
        **origin(run.device),
        "settings": run.settings,
    }


def origin(device: torch.device) -> dict:
    """Where and with what something was measured."""
    return {"hardware": hardware.describe(device),
            "versions": {"refiner_min": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
                         "python": platform.python_version()},
            "commit": package_commit()}


@cache  # a process runs the code that it found when it began
def package_commit() -> str | None:
    """The last commit that changed the package, and "-dirty" if it has been changed since; None where there is no git
    or no repository of it."""
    def git(*words) -> str:
        return subprocess.run(["git", *words, "--", "."], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H")
        return commit + "-dirty" * bool(git("status", "--porcelain")) if commit else None
    except OSError:
        return None


def note_resumed(run):
    """Say in config.json where a run goes on at another commit, with other versions or on other hardware."""
    record = recorded(run.out / "config.json")
    if record and run.step < run.recipe.epochs * run.steps_per_epoch:  # else it trains nothing more
        write_json(run.out / "config.json", gone_on_with(record, origin(run.device), step=run.step))


def gone_on_with(record: dict, here: dict, **at: int) -> dict:
    """The facts of a record, and, where its origin was another than here the last time, that it goes on here. at: how
    far it is."""
    resumed = record.get("resumed", [])
    if all((resumed or [record])[-1].get(name) == value for name, value in here.items()):
        return record
    return record | {"resumed": [*resumed, at | here]}


def recorded(path: Path) -> dict:
    """What a file of facts says; nothing where there is none, or a damaged one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def finish(run, arguments: list[str]):
    """Complete the folder of a run that is at its end, and say where the results are."""
    write_history(run.out, run.history, run.title)
    result = results(run.history, averaged=run.ema is not None)
    path = run.out / "config.json"
    write_json(path, (recorded(path) or facts(run, arguments)) | {"result": result})
    weights = "the weights' moving average" if run.ema is not None else "the weights"
    print(f"accuracy {result['accuracy']:.2%} with {weights} (best {result['best_accuracy']:.2%} after epoch "
          f"{result['best_epoch']}), {result['training_minutes']:.1f} minutes of training: {run.out}/best.pt, "
          f"curves.png")


def results(history: list[dict], averaged: bool) -> dict:
    """What config.json says at the end."""
    last, best = history[-1], max(history, key=lambda row: (row["val_accuracy"], row["epoch"]))
    found = {"training_minutes": round(sum(row["seconds"] for row in history) / 60, 2),
             "images_per_second": statistics.median(row["images_per_second"] for row in history),
             "accuracy": last["val_accuracy"], "best_accuracy": best["val_accuracy"], "best_epoch": best["epoch"],
             "weights": "EMA" if averaged else "last"}
    if "val_token_accuracy" in last:
        found["token_accuracy"] = last["val_token_accuracy"]
    return found
