"""What stands beside the package: the rooms and their table, pyproject.toml and environment.yml, and the documents,
which keep to the recorded runs and whose commands are such."""

import ast
import csv
import importlib
import json
import math
import re
import shlex
import statistics
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from refiner_min import __version__, bench, checkpoint, report
from tests.mutations import astray

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "notebooks" / "results"
TABLES = (RESULTS / "README.md").read_text()
OTHERS = ("annotate", "bench", "neighbour", "study")  # which are recorded, and are no runs of train
RUNS = sorted(path for path in RESULTS.glob("*.json") if not path.stem.startswith(OTHERS))
SCENES = {"digit-scenes-cpu-tokens": "each its own digit", "digit-scenes-cpu-pictures": "all the picture's class",
          "digit-scenes-cpu-class": "none: class token only"}
COMMANDS = {"train", "annotate", "explain", "prepare", "bench", "study"}


# ----------------------------------------------------------------------------------------------------------------------
# The rooms

FILES = {path.stem: [path] for path in (ROOT / "refiner_min").glob("*.py")} | {
    "exercises": sorted((ROOT / "refiner_min" / "exercises").glob("*.py"))}
ROOMS = {name: ast.parse("\n".join(path.read_text() for path in paths)) for name, paths in FILES.items()}


def imported(tree: ast.Module) -> set[str]:
    """The rooms that a room imports, wherever in it: always by name, from the package."""
    found = set()
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Import) and any(name.name.startswith("refiner_min") for name in node.names))
        assert not (isinstance(node, ast.ImportFrom) and node.level)
        if isinstance(node, ast.ImportFrom) and node.module == "refiner_min":
            found |= {name.name for name in node.names} & ROOMS.keys()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refiner_min."):
            found.add(node.module.split(".")[1])
    return found


def test_the_table_of_rooms_is_the_folder_and_its_imports():
    table = (ROOT / "refiner_min" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \|(.*)\|$", table, re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", arrows)) for name, arrows in rows} == {
        name: imported(tree) - {name} for name, tree in ROOMS.items()}


def test_rooms_are_small_say_what_they_are_for_and_import_no_command_and_in_no_circle():
    arrows = {name: imported(tree) - {name} for name, tree in ROOMS.items()}
    list(TopologicalSorter(arrows).static_order())  # CycleError
    assert not COMMANDS & set.union(*(arrows[name] for name in ROOMS.keys() - {"study"}))
    assert not any("study" in arrow for arrow in arrows.values())
    for name in ("model", "foreign", "pictures", "relabel", "distributed", "plots"):
        assert not arrows[name], name
    assert not arrows["recipes"] & {"engine", "data", "splits", "records", "evaluation"}  # nothing that trains
    for name, tree in ROOMS.items():
        assert ast.get_docstring(tree), name
        assert all(len(path.read_text().splitlines()) <= 400 for path in FILES[name]), name
    assert len((ROOT / "refiner_min" / "model.py").read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", [name for name in ROOMS if name != "distributed"])
def test_one_room_asks_torch_distributed_and_the_launcher(name):
    source = "\n".join(path.read_text() for path in FILES[name])
    for word in ("torch.distributed", "import distributed\n", "os.environ", "getenv"):
        assert word not in source.replace("refiner_min import distributed\n", "")


def test_every_room_has_its_tests():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert {name.strip("_") for name in ROOMS} <= tests


def test_every_fault_finds_its_text_once():
    assert astray() == []


# ----------------------------------------------------------------------------------------------------------------------
# pyproject.toml, environment.yml


def package_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group()


def test_environment_has_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["notebooks"] + extras["test"]
    conda, pip = (ROOT / "environment.yml").read_text().split("dependencies:")[1].split("- pip:")
    there = re.findall(r"^  - (.+)$", conda, re.MULTILINE)
    assert pip.split() == ["-", "-e", ".[browser,teacher,onnx]"]
    assert {package_name(line) for line in there} == {
        "python", "pip", *(package_name(line).replace("torch", "pytorch") if line.startswith("torch>") else
                           package_name(line) for line in asked)}
    assert f"python{project['requires-python']}" in there
    bounds = {line.replace("torch", "pytorch", 1) if line.startswith("torch>") else line
              for line in asked if ">" in line}
    assert bounds <= set(there)
    assert extras.keys() == {"notebooks", "test", "browser", "teacher", "onnx", "dev"}
    assert extras["dev"] == ["refiner_min[notebooks,test,browser,teacher,onnx]"]


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_tests_of_the_table_of_faults_are_there():
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / "tests" / "README.md").read_text()))
    there = {name for path in (ROOT / "tests").glob("test_*.py")
             for name in (path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.M))}
    assert len(named) > 40 and named <= there


# ----------------------------------------------------------------------------------------------------------------------
# README and its commands


def test_the_readme_fits_on_two_screens():
    lines = README.splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 120


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .+$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m refiner_min.train") and commands[1].endswith("-m pytest --nbval")
    assert "grep -m1 '^python3 -m venv .* -m pytest --nbval$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_difference_from_the_published_code_has_its_test():
    text = (ROOT / "refiner_min" / "DIFFERENCES.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = [row for row in text.splitlines() if row.startswith("| ")][1:]  # without the head
    assert len(rows) >= 14
    for row in rows:
        name = re.search(r"`(test_\w+)` \|$", row).group(1)
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "notebooks/results/README.md", "refiner_min/README.md",
                                  "refiner_min/DIFFERENCES.md"])
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / path).read_text()):
        assert target.startswith("https://") or ((ROOT / path).parent / target).exists(), target


def commands_of(text: str) -> set[str]:
    """The commands of the package in a document's code blocks and between backticks."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^.*-m refiner_min\..*$", blocks, re.MULTILINE)
    inline = re.findall(r"`([^`\n]*-m refiner_min\.[^`\n]*)`", text)
    return {line.split("#")[0].strip() for line in lines + inline}


@pytest.mark.parametrize("command", sorted(commands_of(README) | commands_of(TABLES)))
def test_every_command_is_one(command):
    name, *words = shlex.split(command.split("-m refiner_min.")[1])
    assert name in COMMANDS
    importlib.import_module(f"refiner_min.{name}").parse(words)  # SystemExit, UserError


@pytest.mark.slow
def test_the_readmes_code_runs():
    [code] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 1000) and len(names["maps"]) == 16
    assert names["gathered"].shape == (2, 6, 65, 32)


# ----------------------------------------------------------------------------------------------------------------------
# The recorded runs


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_table_and_the_curves_keep_to_the_recorded_runs(path):
    record = json.loads(path.read_text())
    result = record["result"]
    row = (f"| [{path.stem}]({path.name}) | {record['parameters']:,} | {result['accuracy']:.1%} | "
           f"{result['training_minutes']:.1f} | {result['images_per_second']:.0f} |")
    tokens = f" {result['token_accuracy']:.1%} |" if "token_accuracy" in result else ""
    if "experiment" not in record:  # of an experiment they stand in study.md: test_report.py
        assert row + tokens in TABLES
        assert f"\n{record['command']}\n" in TABLES
    with open(path.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_accuracy"]) == result["accuracy"]
    assert len(rows) == math.ceil(record["recipe"]["epochs"] / record["recipe"].get("validate_every", 1))
    for fact in ("hardware", "versions", "commit", "recipe", "config"):
        assert record[fact]


@pytest.mark.parametrize("name, run", [("ti", "headline-refined-seed0"), ("plain-ti", "headline-plain-seed0")])
def test_the_weights_that_come_along_are_those_of_the_recorded_runs(name, run):
    record, path = json.loads((RESULTS / f"{run}.json").read_text()), checkpoint.ASSETS / f"{name}.pt"
    state, model = checkpoint.load(path), checkpoint.load_pretrained(name)
    assert path.stat().st_size <= 5e6
    assert all(state[fact] == record[fact] for fact in ("recipe", "classes", "pictures"))
    assert json.loads(json.dumps(state["config"])) == record["config"]  # which has lists for tuples
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    card = (checkpoint.ASSETS / "weights.md").read_text()
    accuracy, pictures = record["result"]["accuracy"], record["pictures"]["val"]
    [row] = re.findall(rf"^\| `{name}.pt` .*$", card, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:5] == [f"{record['parameters']:,}", f"{accuracy:.2%}".replace("%", " %")]
    assert abs(float(cells[5].removesuffix(" %")) / 100 - accuracy) * pictures <= 2.5  # two pictures, rounded
    flags = record["command"].partition("imagenette2-224 ")[2].partition(" --device")[0]
    assert flags.replace(" --no-refine", "") in card


def test_the_card_says_how_its_recipe_compares():
    held_out = {name: records[0]["result"]["accuracy"] for name, records in report.load(RESULTS).items()
                if name.startswith("recipe-")}
    assert len(held_out) == 4 and min(held_out, key=held_out.get) == "recipe-cutmix"
    behind = 100 * (max(held_out.values()) - held_out["recipe-cutmix"])
    assert max(held_out, key=held_out.get) == "recipe-preset"
    assert f"is last, {behind:.1f} points behind the preset's" in (checkpoint.ASSETS / "weights.md").read_text()


def spread(values: list[float]) -> str:
    """In percent: the mean, and the deviation if there are several."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation} %"


@pytest.mark.parametrize("experiment, text, labels, said", [
    ("imagenette-depth12", "12 epochs, 12 blocks", ("plain ViT", "refined"), "with 12 blocks"),
    ("headline", "50 epochs of cutmix, 6 blocks", ("plain ViT `plain-ti`", "refined `ti`"),
     "50 epochs, one seed:")])
def test_the_readme_keeps_to_the_study(experiment, text, labels, said):
    found = {}
    for name, row in zip(("plain", "refined"), labels):
        paths = sorted(RESULTS.glob(f"{experiment}-{name}-seed*.json"))
        records = [json.loads(path.read_text()) for path in paths]
        found[name] = [record["result"]["accuracy"] for record in records]
        assert (f"| Imagenette, 64 px, {text}, {row} | {len(records)} | {records[0]['parameters']:,} | "
                f"{spread(found[name])} |") in README
    pairs = [100 * (refined - plain) for plain, refined in zip(found["plain"], found["refined"], strict=True)]
    several = len(pairs) > 1
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}" if several else ""
    assert f"{said} {statistics.mean(pairs):+.1f}{error}" in " ".join(README.split())


@pytest.mark.parametrize("mode, row, columns", [
    ("eval", "evaluation", ("reference", "eager", "compiled", "folded", bench.YARDSTICK)),
    ("train", "training step", ("reference", "eager", "compiled", None, bench.YARDSTICK))])
def test_the_readme_keeps_to_the_measured_speed(mode, row, columns):
    rows = json.loads((RESULTS / f"bench-s-224px-{mode}.json").read_text())
    assert all((row["model"], row["img_size"], row["batch_size"]) == ("s", 224, 8) for row in rows)
    cells = {(row["variant"], row["dtype"]): f"{row['ms']:.0f} ({100 * row['floor_share']:.0f} %)" for row in rows}
    for dtype, name in (("float32", "float32"), ("bfloat16", "bf16")):
        assert f"| {row}, {name} | {' | '.join(cells.get((column, dtype), '-') for column in columns)} |" in README


def test_what_to_expect_keeps_to_the_recorded_runs():
    for pattern, text in (("digits-cpu-seed*", "digits, built in"),
                          ("digit-scenes-cpu-tokens-seed*", "built in, a label for every patch")):
        results = [json.loads(path.read_text())["result"] for path in RESULTS.glob(f"{pattern}.json")]
        minutes = statistics.mean(result["training_minutes"] for result in results)
        accuracy = 100 * statistics.mean(result["accuracy"] for result in results)
        assert f"| {text}: {minutes:.1f} minutes, {accuracy:.0f} % |" in README


@pytest.mark.parametrize("name", SCENES)
def test_the_table_keeps_to_the_means_of_the_scenes(name):
    results = [json.loads(path.read_text())["result"] for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]
    assert len(results) == 3
    tokens = [result["token_accuracy"] for result in results if "token_accuracy" in result]
    minutes = statistics.mean(result["training_minutes"] for result in results)
    accuracy = spread([result["accuracy"] for result in results])
    assert f"| {SCENES[name]} | {accuracy} | {spread(tokens) if tokens else '-'} | {minutes:.1f} |" in TABLES


def test_the_table_keeps_to_the_recorded_maps():
    record = json.loads((RESULTS / "annotate-imagenette-448px.json").read_text())
    result = record["result"]
    assert f"\n{record['command']}\n" in TABLES
    assert (f"{result['pictures']:,} maps in {result['minutes']:.1f} minutes, {result['pictures_per_second']:.1f} "
            f"pictures a second, {result['megabytes']:.1f} MB") in TABLES.replace("\n", " ")
