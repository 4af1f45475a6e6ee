"""lessons.py: what later notebooks use again."""

import torch
from torch import nn

from refiner_min.data import Subset, load_subset
from refiner_min.lessons import linear_cka, part_of, train


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
