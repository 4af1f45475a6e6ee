"""What stands beside the package: pyproject.toml and environment.yml agree, and README keeps to the recorded runs."""

import csv
import json
import re
import statistics
import tomllib
from pathlib import Path

import pytest

from refiner_min import __version__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "notebooks" / "results"
RUNS = sorted(path for path in RESULTS.glob("*.json") if not path.stem.startswith("annotate"))
SCENES = {"digit-scenes-cpu-tokens": "each its own digit", "digit-scenes-cpu-pictures": "all the picture's class",
          "digit-scenes-cpu-class": "none: class token only"}


def package_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group()


def test_environment_has_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["notebooks"] + extras["test"]
    conda, pip = (ROOT / "environment.yml").read_text().split("dependencies:")[1].split("- pip:")
    there = re.findall(r"^  - (.+)$", conda, re.MULTILINE)
    assert pip.split() == ["-", "-e", ".[browser,teacher]"]
    assert {package_name(line) for line in there} == {
        "python", "pip", *(package_name(line).replace("torch", "pytorch") if line.startswith("torch>") else
                           package_name(line) for line in asked)}
    assert f"python{project['requires-python']}" in there
    bounds = {line.replace("torch", "pytorch", 1) if line.startswith("torch>") else line
              for line in asked if ">" in line}
    assert bounds <= set(there)
    assert extras.keys() == {"notebooks", "test", "browser", "teacher"}


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_readme_has_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .+$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m refiner_min.train") and commands[1].endswith("-m pytest --nbval")
    assert "grep -m1 '^python3 -m venv .* -m pytest --nbval$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_links_of_the_readme_resolve():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_readme_and_curves_keep_to_the_recorded_runs(path):
    record = json.loads(path.read_text())
    result = record["result"]
    row = (f"| [{path.stem}](notebooks/results/{path.name}) | {record['parameters']:,} | {result['accuracy']:.1%} | "
           f"{result['training_minutes']:.1f} | {result['images_per_second']:.0f} |")
    tokens = f" {result['token_accuracy']:.1%} |" if "token_accuracy" in result else ""
    assert row + tokens in README
    assert record["command"] in README
    with open(path.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_accuracy"]) == result["accuracy"]
    assert len(rows) == record["recipe"]["epochs"]
    for fact in ("hardware", "versions", "commit", "recipe", "config"):
        assert record[fact]


@pytest.mark.parametrize("name", SCENES)
def test_readme_keeps_to_the_means_of_the_scenes(name):
    results = [json.loads(path.read_text())["result"] for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]
    assert len(results) == 3

    def cell(key):
        values = [100 * result[key] for result in results if key in result]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %" if values else "-"

    minutes = statistics.mean(result["training_minutes"] for result in results)
    assert f"| {SCENES[name]} | {cell('accuracy')} | {cell('token_accuracy')} | {minutes:.1f} |" in README


def test_readme_keeps_to_the_recorded_maps():
    record = json.loads((RESULTS / "annotate-imagenette-448px.json").read_text())
    result = record["result"]
    assert record["command"] in README
    assert (f"{result['pictures']:,} maps in {result['minutes']:.1f} minutes, {result['pictures_per_second']:.1f} "
            f"pictures a second, {result['megabytes']:.1f} MB") in README.replace("\n", " ").replace("  ", " ")
