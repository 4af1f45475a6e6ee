"""memory.py: the same step to the last digit, statistics counted once, and less memory."""

from copy import deepcopy

import pytest
import torch

from refiner_min.memory import recompute_maps
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


def kept_bytes(network, images) -> int:
    """What the forward pass keeps for the backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images).logits
    assert output.requires_grad
    return sum(sizes.values())


def test_less_is_kept():
    network = RefinerViT(RefinerConfig(**SMALL | dict(img_size=32))).train()
    images = torch.randn(4, 3, 32, 32)
    before = kept_bytes(network, images)
    recompute_maps(network)
    assert kept_bytes(network, images) < 0.7 * before


def test_the_flag_reaches_the_model_and_not_its_average(pictures):
    run = run_of(pictures, "--checkpoint-maps", "--ema", "0.9")
    for network, recomputes in ((run.model, True), (run.ema, False)):
        refinement = network.blocks[1].attention.refinement
        assert ("forward" in vars(refinement)) == recomputes
    assert "forward" not in vars(run_of(pictures).model.blocks[1].attention.refinement)
