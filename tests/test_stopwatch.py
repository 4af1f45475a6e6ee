"""stopwatch.py: turn by turn, medians without the warm-up, the peak of one call, a call in another process."""

import os
import sys
import time
from functools import partial

import pytest
import torch

from refiner_min import hardware, stopwatch
from refiner_min.stopwatch import Elsewhere, duration, measured, medians, peak

CPU = torch.device("cpu")


def test_medians_are_over_the_rounds_after_the_warm_up(monkeypatch):
    turns, seconds = [], {"a": iter([9, 9, 3, 1, 2]), "b": iter([9, 9, 6, 5, 4])}
    monkeypatch.setattr(stopwatch, "duration", lambda name, device: (turns.append(name), next(seconds[name]))[1])
    assert medians(["a", "b"], 3, CPU) == [2, 5] and turns == ["a", "b"] * 5


def test_a_duration_is_that_of_the_call():
    assert 0.1 <= duration(partial(time.sleep, 0.1), CPU) < 0.5


def ones_in_kept_memory():
    hardware.choose_device("cpu")
    return torch.ones


def peaks(ones, device):
    return [peak(partial(ones, megabytes * 2**18), device) / 2**20 for megabytes in (200, 50)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be counted anew")
def test_the_peak_is_that_of_one_call_not_of_those_before():
    """In a process of its own, in which nothing else is freed meanwhile."""
    call = Elsewhere(ones_in_kept_memory)
    one, two = measured(peaks, call, CPU)
    assert one == pytest.approx(200, rel=0.05) and two == pytest.approx(50, rel=0.1)
    call.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be counted anew")
def test_the_peak_elsewhere_is_not_that_of_the_process_that_started_it():
    large = torch.ones(400 * 2**18)
    call = Elsewhere(partial, torch.ones, 50 * 2**18)
    assert measured(peak, call, CPU) == pytest.approx(50 * 2**20, rel=0.1) and len(large)
    call.close()


def process_of(call, device):
    return os.getpid(), call()


def test_elsewhere_is_another_process_and_always_the_same():
    call = Elsewhere(partial, max, 3, 5)
    (one, three), (two, _), (here, _) = (measured(process_of, made, CPU) for made in (call, call, partial(max, 3, 5)))
    call.close()
    assert one == two != here == os.getpid() and three == 5
