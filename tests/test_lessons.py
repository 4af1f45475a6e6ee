"""lessons.py: what later notebooks use again."""

from pathlib import Path

import torch
from torch import nn

from refiner_min.data import Subset, load_subset
from refiner_min.explain import evaluation_image
from refiner_min.lessons import linear_cka, looks, part_of, photographs, train
from refiner_min.model import RefinerConfig


def test_a_class_is_built_method_by_method():
    class Number:
        def __init__(self, value):
            self.value = value

    @part_of(Number)
    def doubled(self):
        return 2 * self.value

    assert Number(3).doubled() == 6 and doubled(Number(4)) == 8


def test_a_linear_layer_learns_the_digits():
    digits = load_subset("digits", None, 8)
    torch.manual_seed(0)
    found = train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, epochs=2, lr=1e-2)
    assert isinstance(digits, Subset) and len(found) == 2 and 80 < found[-1] <= 100 and found[0] < found[1]


def test_cka_sees_neither_rotation_nor_scale():
    x = torch.randn(50, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert abs(linear_cka(x, 3 * x @ turn + 1) - 1) < 1e-12
    assert linear_cka(x, torch.randn(50, 8, dtype=torch.float64)) < 0.6


def test_the_photographs_are_as_explain_shows_them(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1] / "notebooks")
    found = photographs(32)
    for image, name in zip(found, ("chelsea", "china", "flower"), strict=True):
        assert torch.equal(image, evaluation_image(f"photos/{name}.jpg", RefinerConfig(img_size=32))[0])


def test_what_a_token_gives_to_the_patches_is_its_row_on_the_grid():
    maps = torch.rand(2, 3, 10, 10)
    found = looks(maps, 1, token=4)
    assert len(found) == 3 and all(torch.equal(found[e][r, c], maps[1, e, 4, 1 + 3 * r + c])
                                   for e in range(3) for r in range(3) for c in range(3))
    assert torch.equal(looks(maps, 0)[2].flatten(), maps[0, 2, 0, 1:])
