"""The notebooks, without running them: their code is the package's, their outputs are there and hold nothing of the
machine they were made on, and every exercise's check takes the solution and names the fault of wrong answers."""

import ast
import base64
import difflib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = {name: (ROOT / "refiner_min" / f"{name}.py").read_text() for name in ("model", "relabel", "lessons")}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(cell: dict) -> str:
    """Without IPython's magics."""
    return "\n".join(line for line in source(cell).split("\n") if not line.startswith("%"))


def definitions(source: str) -> dict[tuple[str, str], str]:
    """What is defined at the top, written out again without docstrings and comments: functions as ("", name), methods
    as (class, name), a class's first line and fields as (class, ""). A function under part_of(CLASS) is a method, a
    reader's own where there is one (solution_of)."""
    found = {}
    for node in ast.parse(source).body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
                inner.body = inner.body[1:]
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {(node.name, method.name): ast.unparse(method) for method in methods}
            node.body = [inner for inner in node.body if inner not in methods]
            found[node.name, ""] = ast.unparse(node)
        elif isinstance(node, ast.FunctionDef):
            classes = [re.fullmatch(r"part_of\((\w+)\)", ast.unparse(decorator)) for decorator in node.decorator_list]
            owners = [name.group(1) for name in classes if name]
            if owners:
                node.decorator_list = [decorator for decorator in node.decorator_list if not re.fullmatch(
                    r"(part|solution)_of\(\w+\)", ast.unparse(decorator))]
            found["".join(owners), node.name] = ast.unparse(node)
    return found


KNOWN = {name: text for module in MODULES.values() for name, text in definitions(module).items()}


@each_notebook
def test_what_bears_a_name_of_the_package_is_its_code(path):
    for cell in cells(path, "code"):
        for name, text in definitions(code(cell)).items():
            if name[0] and (name[0], "") in KNOWN:
                assert name in KNOWN, f"{name[0]} has no method {name[1]}"
            difference = difflib.unified_diff(KNOWN.get(name, text).split("\n"), text.split("\n"), "package", path.name)
            assert text == KNOWN.get(name, text), "\n".join(difference)


def test_all_of_the_model_is_shown_but_its_configuration():
    shown = {name for path in NOTEBOOKS for cell in cells(path, "code") for name in definitions(code(cell))}
    model = {name for name in definitions(MODULES["model"]) if name[0] != "RefinerConfig"}
    assert len(model) > 25 and model <= shown


@each_notebook
def test_every_cell_was_run_in_order_and_its_outputs_are_there(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert 15 <= len(counts) <= 60
    kinds = [output["output_type"] for cell in cells(path, "code") for output in cell["outputs"]]
    assert "error" not in kinds and kinds.count("stream") >= 5
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_outputs_hold_nothing_of_a_machine(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            text = "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
            assert not re.search(r"/(home|root|work|tmp|Users)/|0x[0-9a-f]{6}|\d (ms|seconds|minutes)\b", text), text


@each_notebook
def test_cells_are_short(path):
    for cell in cells(path, "code"):
        repeats = set(definitions(code(cell))) & set(KNOWN)
        lines = source(cell).split("\n")
        assert len(lines) <= (60 if repeats else 25), source(cell)[:80]
        assert max(map(len, lines)) <= 105, "JupyterLab shows no more beside its file list in a window of 1280 pixels"


@each_notebook
def test_the_picture_in_the_readme_is_one_of_the_notebook(path):
    assert f"![](notebooks/{path.stem}.png)" in (ROOT / "README.md").read_text()
    pictures = [output["data"]["image/png"] for cell in cells(path, "code") for output in cell["outputs"]
                if "image/png" in output.get("data", {})]
    assert path.with_suffix(".png").read_bytes() in map(base64.b64decode, pictures)


@each_notebook
def test_links_resolve(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", source(cell)):
            assert target.startswith("https://") or (path.parent / target).exists(), target


@each_notebook
def test_every_exercise_has_a_stub_a_collapsed_solution_and_a_check(path):
    found = cells(path, "code")
    solutions = [index for index, cell in enumerate(found) if "@solution_of(" in source(cell)]
    assert len(solutions) >= 3
    for index in solutions:
        assert found[index]["metadata"]["jupyter"] == {"source_hidden": True}
        name = re.search(r"solution_of\((\w+)\)", source(found[index])).group(1)
        assert f"def {name}(" in source(found[index - 1]) and "..." in source(found[index - 1])
        assert re.search(rf"exercises\.check_\w+\({name}\)", source(found[index + 1]))


def test_the_readme_counts_the_exercises():
    headings = [line for path in NOTEBOOKS for cell in cells(path, "markdown") for line in source(cell).split("\n")
                if line.startswith("### Exercise ")]
    assert all(re.fullmatch(r"### Exercise \d: .+ \((easy|medium|hard), \d+ minutes\)", line) for line in headings)
    hard = sum("(hard, " in line for line in headings)
    words = "zero one two three four five six seven eight nine ten".split()
    assert f"{len(headings)} exercises, {words[hard]} of them hard" in (ROOT / "README.md").read_text()
