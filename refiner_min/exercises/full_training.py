"""The checks of notebooks/05_full_training.ipynb."""

import math

import torch

from refiner_min.exercises import WrongAnswer, answer, compare, random


def check_schedule(rate):
    """rate(step, warmup, total): the share of the peak learning rate; linear warm-up, then half a cosine to zero that
    counts from step 0."""
    def curve(step, warmup, total, begin=0, whole=1):
        if step < warmup:
            return step / warmup
        return (1 + math.cos(whole * math.pi * (step - begin) / (total - begin))) / 2

    steps = [0, 3, 9, 10, 11, 35, 60, 99]
    right = torch.tensor([curve(step, 10, 100) for step in steps])
    compare(torch.tensor([float(answer(rate, step, 10, 100)) for step in steps]), right, {
        "the warm-up begins at 0, and the cosine where the warm-up ends": torch.tensor(
            [(step + 1) / 11 if step < 10 else curve(step, 10, 100, begin=10) for step in steps]),
        "the warm-up begins at 0": torch.tensor([(step + 1) / 11 if step < 10 else curve(step, 10, 100)
                                                 for step in steps]),
        "the cosine counts from step 0, not from the end of the warm-up":
            torch.tensor([curve(step, 10, 100, begin=10) for step in steps]),
        "the cosine runs a whole turn and climbs again; half a turn ends at zero":
            torch.tensor([curve(step, 10, 100, whole=2) for step in steps]),
        "there is no warm-up": torch.tensor([(1 + math.cos(math.pi * step / 100)) / 2 for step in steps]),
    })


def check_average(average):
    """average(old, weights, decay): the moving average after one more step."""
    old, weights = random(5), random(5, seed=1)
    compare(answer(average, old, weights, 0.9), 0.9 * old + 0.1 * weights, {
        "the weights have changed places: the decay is the share that stays": 0.1 * old + 0.9 * weights,
        "the new weights are added without their share": 0.9 * old + weights,
        "that is a plain mean of the two": (old + weights) / 2,
    })


def check_drop_rates(rates):
    """rates(depth, last): drop path's rate of each block, rising linearly from 0 to last."""
    found = answer(rates, 6, 0.25)
    try:
        found = torch.tensor([float(rate) for rate in found])
    except TypeError:
        raise WrongAnswer(f"it returned {found!r}, not a list of rates, one for each block") from None
    compare(found, torch.linspace(0, 0.25, 6), {
        "every block has the same rate; it must rise from 0 at the first": torch.full((6,), 0.25),
        "the last block does not reach the rate: divide by depth - 1": 0.25 * torch.arange(6) / 6,
        "the first block has a rate above zero": 0.25 * torch.arange(1, 7) / 6,
        "the rates fall; they must rise": torch.linspace(0.25, 0, 6),
    })
