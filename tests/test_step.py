"""step.py: the pieces of a step against their definitions."""

import math

import pytest
import torch

from refiner_min import UserError, step
from refiner_min.recipes import Recipe
from refiner_min.relabel import Labels
from tests.runs import CPU, run_of


def test_decay_is_on_matrices_and_kernels_only(pictures):
    run = run_of(pictures)
    decay, rest = step.parameter_groups(run.model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    chosen = {id(parameter) for parameter in decay["params"]}
    for name, parameter in run.model.named_parameters():
        is_kernel = name.endswith("weight") and parameter.ndim > 1
        assert (id(parameter) in chosen) == is_kernel, name
    assert len(decay["params"]) + len(rest["params"]) == len(list(run.model.parameters()))


@pytest.mark.parametrize("flags", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)], ids=str)
def test_labels_are_mixed_as_the_pictures_are(flags):
    """Every picture shows the number of its class, so the mean of a mixed picture is what its label must be."""
    torch.manual_seed(0)
    mix = step.make_mixing(Recipe(**flags), num_classes=8)
    labels = torch.arange(8)
    shares = set()
    for _ in range(20):
        images = labels.float()[:, None, None, None].expand(8, 3, 16, 16).clone()
        mixed, (soft, _) = mix(images, Labels(labels))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ labels.float(), atol=1e-4, rtol=1e-4)
        shares.add(round(soft.max(dim=1).values[0].item(), 4))
    assert len(shares) > 5
    images, same = step.make_mixing(Recipe(), 8)(images, Labels(labels))
    assert same.image is labels


def test_the_mean_loss_is_a_mean_over_pictures():
    watch = step.LossWatch(CPU)
    watch.add(torch.tensor(1.0), 10, 0)
    watch.add(torch.tensor(4.0), 5, 1)
    assert watch.mean() == pytest.approx(2.0) and watch.shown == 4.0
    with pytest.raises(UserError, match="not finite at step 7"):
        watch.add(torch.tensor(math.inf), 5, 7)
    watch.bad.clamp_(max=8)  # as later steps leave it
    with pytest.raises(UserError, match="the loss was not finite at step 7"):
        watch.mean()
