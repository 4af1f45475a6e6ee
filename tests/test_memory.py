"""memory.py: the same step to the last digit, statistics counted once, and less memory."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from refiner_min.memory import kept_bytes, recompute_maps, refinement_bytes
from refiner_min.model import RefinerConfig, RefinerViT
from tests.runs import run_of

SMALL = dict(img_size=16, patch_size=4, num_classes=3, dim=16, depth=4, heads=2, stem=(4, 4, 4), layer_scale=0.1)


def step(network, images):
    """Gradients and statistics after a forward and a backward pass."""
    output = network.forward_head(network.forward_features(images))
    output.logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return gradients, dict(network.named_buffers())


@pytest.mark.parametrize("options", [{}, dict(share=False), dict(linear=True, share=False), dict(refine=False),
                                     dict(expand=1), dict(unrefined=True)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_and_statistics_are_the_same(options, training):
    torch.manual_seed(0)
    kept = RefinerViT(RefinerConfig(**SMALL, **options)).double().train(training)
    recomputed = deepcopy(kept)
    recompute_maps(recomputed)
    for _ in range(2):  # the second step's statistics are added to the first one's
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        (one, statistics), (two, others) = step(kept, images), step(recomputed, images)
        assert one.keys() == two.keys() and statistics.keys() == others.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert all(torch.equal(statistics[name], others[name]) for name in statistics)
    assert list(kept.state_dict()) == list(recomputed.state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_less_is_kept_as_the_formula_says(bf16):
    """A picture more: to the byte."""
    config = RefinerConfig(**SMALL | dict(img_size=32))
    kept = {}
    for recomputed in (False, True):
        network = RefinerViT(config).train()
        if recomputed:
            recompute_maps(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            one, two = (kept_bytes(partial(network, torch.randn(count, 3, 32, 32))) for count in (1, 2))
        kept[recomputed] = two - one
    assert kept[False] - kept[True] == refinement_bytes(config, 2 if bf16 else 4) > 0.3 * kept[False]


def test_the_flag_reaches_the_model_and_not_its_average(pictures):
    run = run_of(pictures, "--checkpoint-maps", "--ema", "0.9")
    for network, recomputes in ((run.model, True), (run.ema, False)):
        refinement = network.blocks[1].attention.refinement
        assert ("forward" in vars(refinement)) == recomputes
    assert "forward" not in vars(run_of(pictures).model.blocks[1].attention.refinement)
