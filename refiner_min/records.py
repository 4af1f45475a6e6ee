"""What a run leaves for people in its folder: config.json, metrics.csv and curves.png; and its table on the screen.

What it leaves to go on from is engine.Run.state, written by checkpoint. It imports distributed, hardware and plots.
"""

import platform
import shlex
import statistics
import subprocess
from pathlib import Path

import torch
import torchvision

from refiner_min import __version__, distributed, hardware, replacing

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


def package_commit() -> str | None:
    """The last commit that changed the package; None where there is no git or no repository of it."""
    try:
        git = subprocess.run(["git", "log", "-1", "--format=%H", "--", "."], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


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
