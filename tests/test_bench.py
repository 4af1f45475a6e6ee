"""bench.py: every variant in every format, the faster of two, the file that others read, mistakes."""

import json

import pytest
import torch

from refiner_min import UserError, bench
from refiner_min.bench import FORMATS

SMALL = ["--model", "ti", "--img-size", "16", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
KEYS = {"variant", "dtype", "mode", "ms", "images_per_second", "peak_bytes", "floor_share", "model", "hardware"}


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """It takes a minute; what is compiled is tested with the trainer."""
    monkeypatch.setattr(torch, "compile", lambda network: network)
    monkeypatch.setattr(bench, "plain_vit", lambda size: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * size**2, 10)))


@pytest.mark.parametrize("mode, last", [("eval", "folded"), ("train", "checkpointed")])
def test_every_variant_has_its_row(mode, last, tmp_path, capsys):
    assert bench.main([*SMALL, "--mode", mode, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    said = capsys.readouterr().out
    assert [(row["variant"], row["dtype"]) for row in rows] == [("reference", "float32"), *(
        (name, dtype) for name in ("eager", "compiled", last, bench.YARDSTICK) for dtype in FORMATS)]
    for row in rows:
        assert KEYS <= row.keys() and row["mode"] == mode and row["peak_bytes"] >= 0
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"]) and 0 < row["floor_share"]
        assert f"{row['variant']:16}{row['dtype']:10}{row['ms']:9.1f}" in said
    assert "matrix product in bfloat16" in said and "copy: " in said


def test_a_machine_without_a_compiler_leaves_the_compiled_out(monkeypatch, capsys):
    def fail(*words):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda network: fail)
    assert bench.main(SMALL) == 0
    said = capsys.readouterr().out
    assert "compiled in float32, compiled: left out, torch.compile fails here (no compiler)\n" in said
    assert [line.split()[0] for line in said.splitlines() if line.endswith("%")] == [
        "reference", *2 * ["eager"], *2 * ["folded"], *2 * ["timm"]]


def test_the_memory_of_the_maps_is_that_of_the_formula(monkeypatch):
    monkeypatch.setattr(bench.itertools, "product", lambda *_: [("s", 64), ("m", 96), ("l", 128)])
    for line in bench.map_memory(torch.device("cpu")).splitlines()[1:]:
        formula, measured = map(float, line.split()[2:])
        assert measured == pytest.approx(formula, abs=1)


@pytest.mark.parametrize("words, message", [
    (["--img-size", "100"], "--img-size 100: patch_size=16 must divide img_size=100"),
    (["--batch-size", "0"], "--batch-size 0 must be at least 1"), (["--rounds", "0"], "--rounds 0 must be at least 1"),
])
def test_mistakes(words, message):
    with pytest.raises(UserError, match=message):
        bench.main(words)
