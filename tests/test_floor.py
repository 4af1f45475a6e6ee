"""floor.py: operations and numbers moved against counts by hand, and the longer of the two."""

import pytest
import torch
from torch import nn

from refiner_min.floor import count, least_seconds, probes
from refiner_min.model import Refinement, RefinerConfig, RefinerViT


def test_a_linear_layer_by_hand():
    """(6, 5) times (5, 7): forward one product; backward one for the weight, none for the input, which wants none."""
    build = lambda: nn.Linear(5, 7, bias=False)  # noqa: E731
    moved = 6 * 5 + 5 * 7 + 6 * 7
    assert count(build, (6, 5), training=False) == (2 * 6 * 5 * 7, moved)
    assert count(build, (6, 5), training=True) == (2 * 2 * 6 * 5 * 7, 2 * moved)


def test_a_refinement_by_formula():
    tokens, heads, expanded = 17, 4, 12
    operations, numbers = count(lambda: Refinement(RefinerConfig(heads=4, dim=64)), (2, heads, tokens, tokens), False)
    assert operations == 2 * 2 * tokens**2 * (heads * expanded + 9 * expanded + expanded * heads)
    weights = heads * expanded + 9 * expanded + expanded * heads
    assert numbers == 2 * tokens**2 * (2 * heads + 4 * expanded) + weights


def test_the_floor_is_the_longer_of_the_two():
    rates = {"torch.float32": 100, "torch.bfloat16": 400, "copy": 10}
    assert least_seconds((1000, 5), torch.float32, rates) == 10
    assert least_seconds((1000, 100), torch.bfloat16, rates) == 20
    assert least_seconds((1000, 100), torch.float32, rates) == 40


def test_the_probes_do_what_they_say():
    found = probes(torch.device("cpu"))
    assert found.keys() == {"torch.float32", "torch.bfloat16", "copy"}
    for name, (call, amount) in found.items():
        result = call()
        if name == "copy":
            assert amount == 2 * result.nbytes and result[-1] == 1
        else:
            assert str(result.dtype) == name and amount == 2 * len(result) ** 3


@pytest.mark.parametrize("refine", [True, False])
def test_training_costs_about_three_times_as_much(refine):
    config = RefinerConfig(img_size=32, patch_size=8, dim=48, depth=2, heads=4, num_classes=10, refine=refine)
    evaluation, training = (count(lambda: RefinerViT(config), (2, 3, 32, 32), mode)[0] for mode in (False, True))
    assert 2.6 < training / evaluation < 3
