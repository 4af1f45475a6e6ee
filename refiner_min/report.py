"""The recorded experiments as tables and pictures: notebooks/results/study.md and study-*.png, from the records alone.

    text(load(folder)) -> study.md      a test holds the file to it
    write(folder)                       the file and its pictures; python -m refiner_min.study --report
It imports plots.
"""

import csv
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from refiner_min import plots, replacing

SPEED = "study-speed.json"


@dataclass(frozen=True)
class Table:
    """Experiments of one recipe side by side, {label: experiment}; each is compared with those in against."""

    name: str  # of its picture
    title: str
    rows: dict[str, str]
    against: tuple[str, ...] = ("plain",)
    beside: dict[str, str] = field(default_factory=dict)  # of another table, whose commit trains alike


def rows(prefix: str, labels: str) -> dict[str, str]:
    return {label: f"{prefix}-{label}" for label in labels.split()}


PARTS = "plain deeper refined expansion convolution every-block linear"
TABLES = [
    Table("depth12", "Imagenette, 64 px, depth 12",
          rows("imagenette-depth12", "plain deeper refined sharing expansion convolution every-block"),
          ("plain", "deeper")),
    Table("normalised12", "No branch, the shared map only normalised: Imagenette, 64 px, depth 12",
          rows("imagenette-depth12", "normalised"), (), rows("imagenette-depth12", "plain refined sharing")),
    Table("small12", "Refined maps that begin smaller: Imagenette, 64 px, depth 12",
          rows("imagenette-depth12", "normalised-small every-block-small"), (),
          rows("imagenette-depth12", "plain refined normalised every-block")),
    Table("depth6", "Imagenette, 64 px, depth 6", rows("imagenette-depth6", PARTS), ("plain", "deeper")),
    Table("branch", "What is added to a map, and less of it: Imagenette, 64 px, depth 6",
          rows("imagenette-depth6", "plain sharing small-branch") | {"published": "imagenette-depth6-refined"}),
    Table("normalised", "No branch, the shared map only normalised: Imagenette, 64 px, depth 6",
          rows("imagenette-depth6", "normalised"), (), rows("imagenette-depth6", "plain refined sharing")),
    Table("scenes", "Digit scenes", rows("scenes", PARTS), ("plain", "deeper")),
    Table("tokens", "Token labels: Imagenette, 64 px, depth 6, refined",
          {"refined": "imagenette-depth6-refined"} | rows("imagenette-tokens", "picture maps mixtoken"), ("refined",)),
    Table("lr5e-4", "Half the learning rate: Imagenette, 64 px, depth 6",
          rows("imagenette-depth6-lr5e-4", "plain refined")),
    Table("lr2e-3", "Twice the learning rate: Imagenette, 64 px, depth 6",
          rows("imagenette-depth6-lr2e-3", "plain refined")),
    Table("heads2", "Two heads: Imagenette, 64 px, depth 12", rows("imagenette-depth12-heads2", "plain refined")),
    Table("heads8", "Eight heads: Imagenette, 64 px, depth 12", rows("imagenette-depth12-heads8", "plain refined")),
    Table("depth24", "Imagenette, 64 px, depth 24, dim 128", rows("imagenette-depth24", "plain refined")),
    Table("recipe", "Which recipe for many epochs: Imagenette, 64 px, 40 epochs, on a tenth of the training pictures",
          rows("recipe", "preset cutmix"), ("preset",)),
    Table("recipe-rate", "And with twice the rate: Imagenette, 64 px, 40 epochs, on a tenth of the training pictures",
          rows("recipe", "rate"), (), rows("recipe", "preset cutmix")),
    Table("recipe-mild", "And with a little mixup: Imagenette, 64 px, 40 epochs, on a tenth of the training pictures",
          rows("recipe", "mild"), (), rows("recipe", "preset cutmix")),
    Table("headline", "The small model from scratch: Imagenette, 64 px, 50 epochs", rows("headline", "plain refined")),
    Table("headline-long", "The same for longer, without cutmix: Imagenette, 64 px, 100 epochs",
          rows("headline-long", "plain refined normalised")),
    Table("128px", "Imagenette, 128 px, on a GPU",
          rows("imagenette-128px", "plain refined expansion convolution every-block linear")),
    Table("headline-128px", "S from scratch: Imagenette, 128 px, 200 epochs, on a GPU",
          rows("headline-128px", "plain refined")),
]
MEASURES = {  # heading: what stands there
    "heads alike": lambda measured: mean(measured["head_similarity"]),
    "without even part": lambda measured: mean(measured["head_similarity_centred"]),
    "tokens alike": lambda measured: measured["token_similarity"][-1],
    "entropy": lambda measured: mean(not_refined(measured, "entropy")),
    "distance": lambda measured: mean(not_refined(measured, "distance")),
    "same map": lambda measured: mean([abs(value) for value in known(measured.get("same", []))]),
    "gain": lambda measured: mean(measured.get("gain", [])),
    "branch's share": lambda measured: mean(measured.get("branch_share", [])),
    "kernels kept": lambda measured: mean(measured.get("kept_convolve", [])),
}
ABLATIONS = {  # heading: the measure, an accuracy
    "branch off": "accuracy_without_branch",
    "branch off, BN anew": "accuracy_without_branch_anew",
    "copies": "accuracy_with_copies",
}
# {seeds: how many standard errors are half of a 95 % interval}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
INTRODUCTION = """# What the refinement gains

Written by `python -m refiner_min.study --report` from the records in this folder; a test holds it to them. Each row is
an experiment of [study.py](../../refiner_min/study.py) with its flags; the rows of a table have the same recipe and
epochs, and were run at the same commit and in the same number format. Accuracy is that of the weights' moving average
after the last epoch: mean and standard deviation over seeds. A difference is in points, over the seeds that both have,
paired, with its standard error; **bold** where zero lies outside the 95 % interval of so few seeds (Student's t: 12.7,
4.3, 3.2, 2.8 standard errors of 2 to 5 seeds). Chance in the validation pictures is not in it. Images a second and
minutes of training (without validation) are of a short measurement in float32 with nothing beside it ({speed}); without
one they are left out. The runs themselves shared their two cores, and at depth 12, in bf16, were faster.

plain: a ViT without refinement and sharing; deeper: one with more blocks; refined: as published, in the second block of
each pair; expansion, convolution: without the other; every-block: each block refines its own map; linear: the paper's
form; sharing: pairs share the map as it is, and hand a part of it on to the next pair, as the refined one does too;
small-branch: what is added to a map begins with a deviation of 0.02 (as trained maps have; untrained ones 0.001), and
not of 1; normalised: nothing is added, the shared map goes through the last BatchNorm and its scale (the branch's
parameters are there, and count, but do nothing); normalised-small: what comes out of it begins a tenth as large, as
trained maps are unrefined; every-block-small: refined maps begin as large as in the pairs, a seventh (as published,
the last BatchNorm's output is divided by the root of a head's channels where a map is shared, and not where it is not).

The second table of each is of the same models over validation pictures, means over their blocks
([measures.py](../../refiner_min/measures.py) defines each; runs that were not measured for one are left out of it): how
alike the heads' maps are, and without their even part; how alike tokens are after the last block; entropy (1: even) and
distance (patches) of the maps that gather values unrefined; of the blocks that refine, the correlation of the refined
map with the one that came in (its size), how many times that one is in it (gain), the branch's share of the variance at
the skip, and the cosine of the local kernels with what they began as (they begin large, so the same steps turn them
less than other weights). Then the accuracy, mean and deviation over seeds, with the branch switched off after training:
as it stands, which leaves a small map where the branch was most of it; with BatchNorm's statistics taken anew over
validation pictures, which makes up for that (and gains a little by itself, as normalised shows); and with every refined
map replaced by a scaled copy of the one that came in.
"""


MECHANISM = """## The mechanism alone

The task of [neighbour.py](../../refiner_min/neighbour.py): to name the symbol to the right of the one that is shown, in
a row of 16, or the one below it on a grid of 4 x 4. Mean and deviation of the accuracy over five seeds (chance: 6.7 and
8.3 %); for the steps, the median of the seeds that came to 99 %, with one cycle of the learning rate over 3,000. Every
block refines its own map. faint-places: plain, with vectors for the places that begin at a deviation of 0.02, and not
at 1 as the symbols' do: two plain blocks must find a token by its place, and do not learn that in so many steps then.
`python -m refiner_min.neighbour` ([neighbour.csv](neighbour.csv), [neighbour.json](neighbour.json)).

"""


def known(values: list) -> list:
    return [value for value in values if value is not None]


def mean(values: list) -> float | None:
    """Of those that are known."""
    return statistics.mean(known(values)) if known(values) else None


def not_refined(measured: dict, name: str) -> list[float]:
    """A measure of the blocks that gather with the map as it is: entries of one sign, which a refined one has not."""
    return [value for value, same in zip(measured[name], measured.get("same") or [None] * len(measured[name]))
            if same is None]


# ----------------------------------------------------------------------------------------------------------------------
# Records


def load(folder: Path) -> dict[str, dict[int, dict]]:
    """The records of experiments, {experiment: {seed: record}}, each with its curve, the accuracies, and after which
    epochs these were measured."""
    found = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        if "experiment" in record:
            with open(path.with_suffix(".csv")) as file:
                rows = list(csv.DictReader(file))
            record["curve"] = [float(row["val_accuracy"]) for row in rows]
            record["epochs"] = [int(row["epoch"]) for row in rows]
            found.setdefault(record["experiment"], {})[record["recipe"]["seed"]] = record
    return found


def load_speed(folder: Path) -> dict:
    path = folder / SPEED
    return json.loads(path.read_text()) if path.exists() else {"images_per_second": {}}


def load_neighbours(folder: Path) -> list[dict]:
    """The rows of neighbour.csv."""
    path = folder / "neighbour.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


class Difference(NamedTuple):
    points: float  # the mean over the seeds
    error: float | None  # its standard error; None of one seed
    seeds: int

    def outside(self) -> bool:
        """Whether zero lies outside the 95 % interval of so few seeds."""
        return self.seeds > 1 and abs(self.points) > STUDENT[self.seeds] * self.error

    def __str__(self):
        return f"{self.points:+.1f}" + (f" ± {self.error:.1f}" if self.seeds > 1 else "")


def difference(one: dict[int, dict], other: dict[int, dict]) -> Difference | None:
    """Of two experiments, over the seeds that both have; None where no seed is in both."""
    found = [100 * (one[seed]["result"]["accuracy"] - other[seed]["result"]["accuracy"])
             for seed in one if seed in other]
    if not found:
        return None
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    return Difference(statistics.mean(found), error, len(found))


# ----------------------------------------------------------------------------------------------------------------------
# The text


def text(records: dict, speed: dict, neighbours: list[dict] = ()) -> str:
    """study.md, of what load, load_speed and load_neighbours give."""
    hardware = f"{speed['hardware']}, commit {short(speed['commit'])}" if "hardware" in speed else "not made yet"
    parts = [INTRODUCTION.format(speed=hardware)]
    for table in TABLES:
        if there := recorded(table, records):
            parts.append(section(table, there, others(table, records), speed["images_per_second"]))
    return "\n".join(parts + ([mechanism(neighbours)] if neighbours else []))


def short(commit: str | None) -> str:
    """A commit as it is written; where there was no repository none is known."""
    return (commit or "unknown")[:7]


def recorded(table: Table, records: dict) -> dict[str, dict[int, dict]]:
    """The rows that are there, {label: {seed: record}}; none while these are but what others are compared with."""
    there = {label: records[name] for label, name in table.rows.items() if name in records}
    return there if there.keys() - set(table.against) else {}


def others(table: Table, records: dict) -> dict[str, dict[int, dict]]:
    """Those of other tables that it is compared with, as far as they are there, likewise."""
    return {label: records[name] for label, name in table.beside.items() if name in records}


def section(table: Table, there: dict[str, dict[int, dict]], beside: dict[str, dict[int, dict]], speed: dict) -> str:
    """A table, its measures, its picture and its runs. there, and beside: {label: {seed: record}}."""
    tokens = any("token_accuracy" in record["result"] for runs in there.values() for record in runs.values())
    against = {label: there[label] for label in table.against if label in there} | beside
    heads = ["model", "seeds", "parameters", "accuracy", *(["of tokens"] if tokens else []),
             *(f"to {label}" for label in against), "img/s", "minutes"]
    lines = [row(heads), row(["---"] * len(heads))]
    for label, runs in there.items():
        first, images = next(iter(runs.values())), speed.get(table.rows[label])
        lines.append(row([
            label, len(runs), f"{first['parameters']:,}", spread([run["result"]["accuracy"] for run in runs.values()]),
            *([spread([run["result"]["token_accuracy"] for run in runs.values() if "token_accuracy" in run["result"]])]
              if tokens else []),
            *(said(difference(runs, other)) if other is not runs else "-" for other in against.values()),
            f"{images:.0f}" if images else "-", f"{minutes(first, images):.1f}" if images else "-"]))
    measured = {label: [run["measures"] for run in runs.values()] for label, runs in there.items()}
    heads = ["model", *MEASURES, *ABLATIONS]
    lines += ["", row(heads), row(["---"] * len(heads))]
    for label, found in measured.items():
        lines.append(row([label, *(number(mean([of(one) for one in found])) for of in MEASURES.values()),
                          *(spread(known([one.get(name) for one in found])) for name in ABLATIONS.values())]))
    commits = sorted({short(run["commit"]) for runs in there.values() for run in runs.values()})
    runs = [f"`{table.rows[label]}`: `{without_seed(next(iter(runs.values()))['command'])}`, seeds "
            + ", ".join(f"[{seed}]({table.rows[label]}-seed{seed}.json)" for seed in sorted(runs))
            for label, runs in there.items()]
    lines += ["", f"![](study-{table.name}.png)"]
    lines += [f"![](study-{table.name}-why.png)"] if {"plain", "refined"} <= there.keys() else []
    above = f"; {', '.join(beside)}: above" if beside else ""
    lines += ["", f"Commit {', '.join(commits)}; {first['hardware']}{above}:", ""]
    return "\n".join([f"## {table.title}", "", *lines, *(f"- {run}" for run in runs), ""])


def mechanism(neighbours: list[dict]) -> str:
    """The table of neighbour.py."""
    columns = list(dict.fromkeys((run["task"], run["blocks"], run["steps"]) for run in neighbours))
    longest = max((int(steps) for _, _, steps in columns))
    heads = [f"steps to 99 %, {blocks} block{'s' * (blocks != '1')}" if int(steps) == longest else
             f"{task}, {steps} steps" for task, blocks, steps in columns]
    lines = [row(["model", *heads]), row(["---"] * (1 + len(heads)))]
    for variant in dict.fromkeys(run["variant"] for run in neighbours):
        cells = [[run for run in neighbours if run["variant"] == variant and column == (
            run["task"], run["blocks"], run["steps"])] for column in columns]
        lines.append(row([variant, *(steps_to_99(cell) if int(steps) == longest else
                                     spread([float(run["accuracy"]) for run in cell])
                                     for cell, (_, _, steps) in zip(cells, columns))]))
    return MECHANISM + "\n".join([*lines, ""])


def steps_to_99(runs: list[dict]) -> str:
    """The median over the runs that reached it, and how many those are."""
    if not runs:
        return "-"
    reached = [int(run["steps_to_99"]) for run in runs if run["steps_to_99"]]
    return f"{statistics.median(reached):.0f} ({len(reached)} of {len(runs)})" if reached else f"- (0 of {len(runs)})"


def row(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def spread(values: list[float]) -> str:
    """In percent: the mean, and the standard deviation if there are several."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation} %"


def said(found: Difference | None) -> str:
    if found is None:
        return "-"
    return f"**{found}**" if found.outside() else str(found)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def minutes(record: dict, images_per_second: float) -> float:
    """Of training all of the run's epochs."""
    recipe = record["recipe"]
    pictures = record["pictures"]["train"] // recipe["batch_size"] * recipe["batch_size"] * recipe["epochs"]
    return pictures / images_per_second / 60


def without_seed(command: str) -> str:
    """A recorded command without what is of one seed."""
    return command.split(" --seed ")[0]


# ----------------------------------------------------------------------------------------------------------------------
# The pictures


def pictures(records: dict) -> dict:
    """The figures by their file names: of each table the curves, and what plain and refined models are like."""
    figures = {}
    for table in TABLES:
        if there := recorded(table, records):
            figures[f"study-{table.name}.png"] = plots.lines(
                {label: by_epoch(list(runs.values())) for label, runs in (there | others(table, records)).items()},
                "epoch", "validation accuracy (%)")
        if {"plain", "refined"} <= there.keys():
            figures[f"study-{table.name}-why.png"] = plots.maps_and_tokens(
                {label: measured(there[label]) for label in ("plain", "refined")})
    return figures


def by_epoch(runs: list[dict]) -> tuple[list[int], list[float]]:
    """The epochs, and the mean accuracy after each in percent."""
    return runs[0]["epochs"], [100 * statistics.mean(values) for values in zip(*(run["curve"] for run in runs))]


def measured(runs: dict[int, dict]) -> dict:
    """The measures that are lists, means over the seeds."""
    found = [run["measures"] for run in runs.values()]
    names = ("head_similarity", "head_similarity_centred", "token_similarity", "entropy", "distance", "cka")
    return {name: torch.tensor([one[name] for one in found]).mean(dim=0) for name in names}


def write(folder: Path):
    """study.md and its pictures into the folder of the records."""
    records = load(folder)
    with replacing(folder / "study.md") as file:
        file.write(text(records, load_speed(folder), load_neighbours(folder)).encode())
    for name, figure in pictures(records).items():
        plots.save_figure(figure, folder / name)
