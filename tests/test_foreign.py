"""foreign.py: what others may have written is of the form that is expected, or told in a sentence before it is used."""

import math
import os
import zipfile
from pathlib import Path

import pytest
import torch

from refiner_min import UserError, checkpoint, explain, train
from refiner_min.foreign import check_alike, check_fields, is_a, read_torch
from tests.runs import small


@pytest.mark.parametrize("value, kind, fits", [
    (1, int, True), (True, int, False), (1.0, int, False), (2**63, int, False), (1, float, True), (0.5, float, True),
    (math.nan, float, False), (-math.inf, float, False), (10**400, float, False), (True, float, False),
    (True, bool, True), (None, str | None, True), (1, str | None, False), (["a"], list[str], True),
    ([], list[str], True), (["a", 1], list[str], False), (("a",), list[str], False), ("ab", list[str], False),
    ({"a": 1}, dict[str, int], True),
    ({1: 1}, dict[str, int], False), ({"a": {}}, dict[str, int], False), ((1, 2), tuple[int, int], True),
    ((1, 2, 3), tuple[int, int], False),
    ({"a": torch.zeros(1)}, dict[str, torch.Tensor], True), (None, dict[str, torch.Tensor] | None, True),
    ({"a": None}, dict[str, torch.Tensor] | None, False),
], ids=str)
def test_kinds(value, kind, fits):
    assert is_a(value, kind) is fits


def test_fields_are_named():
    check_fields({"a": 1, "other": None}, {"a": int, "b": str}, ["a"])
    for facts, message in (({}, "its field a is missing"), ({"a": "1"}, "its field a is no int"),
                           ([], "it holds a list in the place of fields"), (None, "it holds a NoneType in the place"),
                           ({"a": 1, "b": ["x"]}, "its field b is no str")):
        with pytest.raises(ValueError, match=message):
            check_fields(facts, {"a": int, "b": str}, ["a"])


def test_places_are_named():
    here = {"a": {"b": torch.zeros(2, 3), "n": 1}, "none": None}
    check_alike({"a": {"b": torch.ones(2, 3), "n": 5}, "none": None}, here, "it")
    for there, message in (({"a": here["a"]}, "it.none is there or here only"), ({**here, "a": []}, "it.a is there or"),
                           ({"a": {"b": torch.zeros(3, 2), "n": 1}, "none": None}, r"it.a.b is \(3, 2\) torch.float32"),
                           ({"a": {"b": torch.zeros(2, 3).half(), "n": 1}, "none": None}, "it.a.b is .* torch.float16"),
                           ({"a": {"b": 1, "n": 1}, "none": None}, "it.a.b is no tensor"),
                           ({"a": here["a"] | {"n": "1"}, "none": None}, "it.a.n is no int"),
                           ({**here, "none": 0}, "it.none is no NoneType")):
        with pytest.raises(ValueError, match=message):
            check_alike(there, here, "it")


# ----------------------------------------------------------------------------------------------------------------------
# Files of torch.save


@pytest.mark.filterwarnings("ignore")  # of torch, on sparse and quantized tensors
@pytest.mark.parametrize("make, message", [
    (lambda: torch.zeros(2, 2).to_sparse(), "no tensor of plain numbers"),
    (lambda: torch.eye(4).to_sparse_csr(), "no tensor of plain numbers"),
    (lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "no tensor of plain numbers"),
    (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "no tensor of plain numbers"),
    (lambda: torch.zeros(4, dtype=torch.complex64), "no tensor of plain numbers"),
    (lambda: torch.empty(4, device="meta"), "no tensor of plain numbers"),
    (lambda: torch.zeros(1).expand(2**32), "a tensor that is larger than the file"),
    (lambda: torch.zeros(1).expand(2, 5, 20000, 20000), "a tensor that is larger than the file"),
], ids=["sparse", "rows", "quantized", "nested", "complex", "meta", "expanded", "expanded maps"])
def test_tensors_that_are_no_plain_numbers_are_refused(make, message):
    for content, name in ((make(), "it"), ({"a": [1, {"weights": (make(),)}]}, "weights")):
        torch.save(content, "file.pt")
        with pytest.raises(ValueError, match=f"{name} is {message}"):
            read_torch("file.pt")


def test_a_file_is_no_larger_in_memory_than_on_the_disk():
    torch.save({"weights": torch.zeros(10**6)}, "file.pt")
    with zipfile.ZipFile("file.pt") as file, zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in file.infolist():
            packed.writestr(part.filename, file.read(part))
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        read_torch("packed.pt")


def test_what_is_no_file_is_told_and_not_waited_for():
    os.mkfifo("pipe.pt")
    Path("folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        with pytest.raises(UserError, match=f"{name} is damaged or not a checkpoint .it is no file"):
            checkpoint.load(name)


def test_a_container_that_holds_itself_is_read():
    content = {"a": [torch.zeros(2)]}
    content["a"].append(content)
    for _ in range(200):  # 2^200 ways through it
        content = {"a": content, "b": content}
    torch.save(content, "file.pt")
    assert read_torch("file.pt").keys() == {"a", "b"}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of a form that is not the run's


def replaced(state: dict, where: tuple, value) -> dict:
    """The state with a value in the place that the keys lead to, or, where the value is KeyError, without the place."""
    first, *rest = where
    if value is KeyError and not rest:
        return {name: item for name, item in state.items() if name != first}
    return state | {first: replaced(state[first], tuple(rest), value) if rest else value}


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The state of a run of two steps, with an average."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(small(pictures, "--epochs", "1", "--out", str(folder))) == 0
    return checkpoint.load(folder / "last.pt")


FIELDS = checkpoint.FIELDS.keys() - {"optimizer", "recipe", "recipe_version", "config"}  # of those: other sentences
MOMENTS = ("optimizer", "state")


@pytest.mark.parametrize("where, value, message", [
    *[((name,), KeyError, f"its field {name} is missing") for name in sorted(FIELDS)],
    *[((name,), [[1]], f"its field {name} is no") for name in sorted(checkpoint.FIELDS)],
    (("optimizer",), KeyError, "no checkpoint to go on from"), (("recipe",), KeyError, "no checkpoint to go on from"),
    (("config",), KeyError, "is no published Refiner-ViT"),
    (("recipe_version",), torch.zeros(0), "its field recipe_version is no int"),
    (("recipe_version",), KeyError, "another version of refiner_min"),
    (("recipe_version",), 1, "another version of refiner_min"),
    (("step",), math.nan, "its field step is no int"), (("step",), 10**30, "its field step is no int"),
    (("step",), 5, "at step 5 of 2"), (("step",), -1, "at step -1 of 2"), (("step",), 0, "at step 0 of 2"),
    (("scheduler",), {}, "its field last_epoch is missing"), (("scheduler", "last_epoch"), -7, "at step 2 of 2"),
    (("scheduler", "last_epoch"), "two", "its field last_epoch is no int"),
    (("model", "head.weight"), torch.zeros(3, 5), r"its state.model.head.weight is \(3, 5\) torch.float32 there"),
    (("model", "head.weight"), KeyError, "its state.model.head.weight is there or here only"),
    (("ema", "head.weight"), torch.zeros(3, 5), r"head.weight: \(3, 5\) in the file, \(3, 192\) in the model"),
    (("ema", "more"), torch.zeros(1), "unknown: more"), (("ema",), None, "its state.ema is there or here only"),
    (("ema", "head.weight"), torch.zeros(3, 192).double(), "its state.ema.head.weight is .* torch.float64 there"),
    ((*MOMENTS, 0, "exp_avg"), torch.zeros(7), r"its state.optimizer.0.exp_avg is \(7,\)"),
    ((*MOMENTS, 0, "exp_avg_sq"), None, "its state.optimizer.0.exp_avg_sq is no tensor"),
    ((*MOMENTS, 0, "exp_avg_sq"), KeyError, "its state.optimizer.0.exp_avg_sq is there or here only"),
    ((*MOMENTS, 0, "step"), 2, "its state.optimizer.0.step is no tensor"),
    ((*MOMENTS, 10**6), {}, "its state.optimizer.1000000 is there or here only"),
    ((*MOMENTS, 0), [], "its state.optimizer.0 is there or here only"), (MOMENTS, [], "its field state is no dict"),
    (("loss",), torch.zeros(7), r"its state.loss is \(7,\)"),
    (("scaler",), {"scale": 1.0}, "its state.scaler.scale is"),
    (("history",), [], "its history is not that of 1 epochs"),
    (("history",), [{"epoch": 1}], "its field step is missing"),
    (("history",), [{"epoch": "one"}], "its field history is no list"),
    (("recipe", "lr"), "much", "another version of refiner_min .its field lr is no float"),
    (("recipe", "lr"), math.inf, "its field recipe is no"),
    (("recipe", "epochs"), 0, "a recipe that cannot be: --epochs 0 must be"),
    (("recipe", "img_size"), 2**13, "a recipe of another model than it holds: img_size"),
    (("recipe", "model"), "xl", "a recipe that cannot be: --model xl must be one of ti, s"),
    (("recipe", "batch_size"), 1000, "--batch-size 1000 is larger than the 24 training pictures"),
    (("config", "depth"), 10**9, "it speaks of 1000000000 blocks, and holds"),
    (("config", "dim"), 2**40, "holds weights of another model than it says"),
    (("config", "img_size"), 2**30, "holds weights of another model than it says"),
    (("config", "stem"), [1, 2], "another version of refiner_min .its field stem"),
    (("classes",), ["one", "two"], "it names 2 classes, and its model has 3"),
    (("subset",), "cars", "on a set of an unknown kind, cars"),
    (("storage",), "tape", "storage .tape there, memory here"),
    (("pictures",), {"train": 1}, "was made with another configuration: pictures"),
], ids=str)
def test_a_checkpoint_of_another_form_is_refused_before_it_is_used(trained, where, value, message):
    checkpoint.save(replaced(trained, where, value), "last.pt")
    with pytest.raises(UserError, match=message):
        train.main(["--resume", "last.pt", "--device", "cpu"])


def test_what_evaluates_is_held_to_what_that_needs(trained, pictures, capsys):
    few = {name: trained[name] for name in ("subset", "data", "recipe", "config", "classes", "ema")}
    photo = str(next((pictures / "val").rglob("*.png")))
    commands = (["--eval", "--weights", "few.pt", "--device", "cpu"], train.main), ([photo, "--weights", "few.pt"],
                                                                                  explain.main)
    checkpoint.save(few, "few.pt")
    assert all(main(words) == 0 for words, main in commands)
    for where, value, message in (
            (("classes",), KeyError, "its field classes is missing"), (("recipe",), {}, "recipe of another model"),
            (("config", "dim"), 2**12, "holds weights of another model than it says"),
            (("data",), 5, "its field data is no"), (("config", "heads"), 0, "heads=0 must be at least 1"),
            (("ema", "norm.weight"), torch.full((192,), math.nan), "the weights are not finite: norm.weight"),
            (("ema", "norm.weight"), torch.full((192,), 3e38), "gives (answers that are not finite|no finite answer)")):
        checkpoint.save(replaced(few, where, value), "few.pt")
        for words, main in commands:
            with pytest.raises(UserError, match=message):
                main(words)
