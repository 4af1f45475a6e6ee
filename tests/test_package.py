"""What stands beside the package: pyproject.toml and environment.yml agree, and README keeps to the recorded runs."""

import csv
import json
import re
import tomllib
from pathlib import Path

import pytest

from refiner_min import __version__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "notebooks" / "results").glob("*.json"))


def package_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group()


def test_environment_has_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["notebooks"] + extras["test"]
    conda, pip = (ROOT / "environment.yml").read_text().split("dependencies:")[1].split("- pip:")
    there = re.findall(r"^  - (.+)$", conda, re.MULTILINE)
    assert pip.split() == ["-", "-e", ".[teacher]"]
    assert {package_name(line) for line in there} == {
        "python", "pip", *(package_name(line).replace("torch", "pytorch") if line.startswith("torch>") else
                           package_name(line) for line in asked)}
    assert f"python{project['requires-python']}" in there
    bounds = {line.replace("torch", "pytorch", 1) if line.startswith("torch>") else line
              for line in asked if ">" in line}
    assert bounds <= set(there)
    assert extras.keys() == {"notebooks", "test", "teacher"}


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_readme_has_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .+$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m refiner_min.train") and commands[1].endswith("-m pytest")
    assert "grep -m1 '^python3 -m venv .* -m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_links_of_the_readme_resolve():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_readme_and_curves_keep_to_the_recorded_runs(path):
    record = json.loads(path.read_text())
    result = record["result"]
    row = (f"| [{path.stem}](notebooks/results/{path.name}) | {record['parameters']:,} | {result['accuracy']:.1%} | "
           f"{result['training_minutes']:.1f} | {result['images_per_second']:.0f} |")
    assert row in README
    assert record["command"] in README
    with open(path.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_accuracy"]) == result["accuracy"]
    assert len(rows) == record["recipe"]["epochs"]
    for fact in ("hardware", "versions", "commit", "recipe", "config"):
        assert record[fact]
