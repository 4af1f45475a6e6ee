"""neighbour.py: the task is what it says, the nets are made of the package's blocks, and the record is of all runs."""

import csv
import json
from pathlib import Path

import pytest
import torch

from refiner_min import UserError, neighbour
from refiner_min.model import Block
from refiner_min.stopping import claim

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"


@pytest.mark.parametrize("task, away, places", [("right", 1, 15), ("below", 4, 12)])
def test_rows_and_answers(task, away, places):
    torch.manual_seed(0)
    symbols, answers = neighbour.draw(500, task)
    assert symbols.shape == (500, 17) and answers.shape == (500,)
    seen = set()
    for (shown, *row), answer in zip(symbols.tolist(), answers.tolist()):
        assert len(set(row)) == 16 and set(row) <= set(range(20))
        place = row.index(shown)
        assert row[place + away] == answer
        seen.add(place)
    assert seen == set(range(places))


def test_nets_differ_in_their_refinement_alone():
    torch.manual_seed(0)
    symbols, _ = neighbour.draw(3)
    for name, fields in neighbour.VARIANTS.items():
        net = neighbour.make(name, blocks=2)
        assert net(symbols).shape == (3, 20) and all(type(block) is Block for block in net.blocks)
        assert all((block.attention.refinement is None) == (name in ("plain", "faint-places")) for block in net.blocks)
        assert all(getattr(net.config, field) == value for field, value in fields.items() if field != "places")
        assert net.position.std().item() == pytest.approx(fields.get("places", 1), rel=0.1)
    assert neighbour.make("plain").symbols.weight.std().item() == pytest.approx(1, rel=0.1)
    convolution = neighbour.make("convolution").blocks[0].attention.refinement.convolve[0]
    assert convolution.weight.numel() == 36
    one, other = neighbour.make("refined", seed=1), neighbour.make("refined", seed=1)
    assert torch.equal(one(symbols), other(symbols))
    assert not torch.equal(one(symbols), neighbour.make("refined", seed=2)(symbols))


def test_a_convolved_map_finds_the_neighbour_and_a_plain_one_does_not():
    """In one block; below it on the grid, a kernel of three does not reach."""
    *_, (step, reached) = neighbour.train(neighbour.make("convolution"), steps=200)
    assert step == 200 and reached > 0.99
    for variant, task in (("plain", "right"), ("convolution", "below")):
        *_, (_, reached) = neighbour.train(neighbour.make(variant), task, steps=200)
        assert reached < 0.15


def test_training_repeats_ends_at_an_accuracy_and_leaves_testing_out_of_chance():
    one, other = (list(neighbour.train(neighbour.make("plain"), seed=3, steps=40)) for _ in range(2))
    assert one == other and [step for step, _ in one] == [20, 40]
    assert len(list(neighbour.train(neighbour.make("plain"), steps=40, until=0.0))) == 1
    net = neighbour.make("plain")
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    neighbour.accuracy(net, "right", 0)
    assert torch.equal(torch.rand(1), before) and net.training


def test_the_record_is_of_all_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbour, "RUNS", [("right", "plain", 1, 20), ("below", "linear", 2, 40)])
    monkeypatch.setattr(neighbour, "SEEDS", 2)
    monkeypatch.setattr(neighbour, "LONG", 40)
    assert neighbour.main(["--out", "made"]) == 0
    with open("made/neighbour.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["variant"], row["blocks"], row["steps"], row["seed"]) for row in rows] == [
        ("right", "plain", "1", "20", "0"), ("right", "plain", "1", "20", "1"),
        ("below", "linear", "2", "40", "0"), ("below", "linear", "2", "40", "1")]
    assert all(0 <= float(row["accuracy"]) < 0.3 and row["steps_to_99"] == "" for row in rows)
    facts = json.loads((tmp_path / "made" / "neighbour.json").read_text())
    assert facts["command"] == "python -m refiner_min.neighbour" and facts["versions"] and facts["hardware"]
    whole = (tmp_path / "made" / "neighbour.csv").read_text()
    (tmp_path / "made" / "neighbour.csv").write_text("".join(whole.splitlines(keepends=True)[:3]))
    ran = []
    made = neighbour.run
    monkeypatch.setattr(neighbour, "run", lambda *wanted: ran.append(wanted) or made(*wanted))
    neighbour.main(["--out", "made"])
    assert ran == [("below", "linear", 2, 40, 0), ("below", "linear", 2, 40, 1)]
    without_times = [line.rsplit(",", 1)[0] for line in whole.splitlines()]
    assert json.loads((tmp_path / "made" / "neighbour.json").read_text()) == facts  # made at the same place
    (tmp_path / "made" / "neighbour.csv").write_text("".join(whole.splitlines(keepends=True)[:4]))
    elsewhere = {**{name: facts[name] for name in ("versions", "commit")}, "hardware": "another machine"}
    monkeypatch.setattr(neighbour, "origin", lambda device: elsewhere)
    for _ in range(2):  # the second time there is nothing left to run
        neighbour.main(["--out", "made"])
        assert json.loads((tmp_path / "made" / "neighbour.json").read_text()) == facts | {
            "resumed": [{"rows": 3, **elsewhere}]}
        monkeypatch.setattr(neighbour, "origin", lambda device: elsewhere | {"hardware": "a third"})
    again = (tmp_path / "made" / "neighbour.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in again] == without_times


def test_mistakes_are_told(monkeypatch):
    monkeypatch.setattr(neighbour, "RUNS", [])
    Path("file").write_text("precious")
    with pytest.raises(UserError, match="--out file cannot be made"):
        neighbour.main(["--out", "file"])
    assert Path("file").read_text() == "precious"
    Path("other").mkdir()
    for content in (b"a,b\n1,2\n", b"\xff\n"):
        Path("other/neighbour.csv").write_bytes(content)
        with pytest.raises(UserError, match="other/neighbour.csv was not written by this command"):
            neighbour.main(["--out", "other"])
        assert Path("other/neighbour.csv").read_bytes() == content
    Path("folder/neighbour.csv").mkdir(parents=True)
    with pytest.raises(UserError, match="--out folder: the record cannot be read or written"):
        neighbour.main(["--out", "folder"])
    with claim(Path("busy")), pytest.raises(UserError, match="another process is at work in busy"):
        neighbour.main(["--out", "busy"])


def test_the_record_is_whole():
    with open(RESULTS / "neighbour.csv") as file:
        rows = [(row["task"], row["variant"], int(row["blocks"]), int(row["steps"]), int(row["seed"]))
                for row in csv.DictReader(file)]
    assert rows == [(*run, seed) for run in neighbour.RUNS for seed in range(neighbour.SEEDS)]
