"""How long calls take and what memory they want, side by side. It imports hardware."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm

from refiner_min import hardware


class Elsewhere:
    """What make(*words) gives, called in a process of its own, which gives memory back as the system has it by default
    and not as hardware.choose_device sets it. make and words can be pickled. To be closed."""

    def __init__(self, make: Callable, *words):
        spawning = multiprocessing.get_context("spawn")  # a forked process would take the settings with it
        self.pool = ProcessPoolExecutor(1, spawning, initializer=_prepare, initargs=(make, words))

    def measured(self, measure: Callable, device: torch.device):
        """What measure(call, device) gives there."""
        return self.pool.submit(_measured, measure, device).result()

    def close(self):
        self.pool.shutdown()


def _prepare(make: Callable, words: tuple):
    global _call  # of this process
    _call = make(*words)


def _measured(measure: Callable, device: torch.device):
    return measure(_call, device)


def measured(measure: Callable, call, device: torch.device):
    """What measure(call, device) gives, here or Elsewhere."""
    return call.measured(measure, device) if isinstance(call, Elsewhere) else measure(call, device)


def duration(call: Callable, device: torch.device) -> float:
    """The seconds that a call takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def peak(call: Callable, device: torch.device) -> int:
    """The most bytes that a call holds beyond what was held before it."""
    hardware.restart_peak_memory(device)
    before = hardware.peak_memory(device)
    call()
    return hardware.peak_memory(device) - before


def medians(calls: list, rounds: int, device: torch.device) -> list[float]:
    """The median seconds of each call over the rounds, in each of which every one has its turn; two rounds warm up.
    (torch.utils.benchmark's Timer would call everything three times for each of them.)"""
    found = [[] for _ in calls]
    for _ in tqdm(range(rounds + 2), "measuring", unit="round", disable=None):
        for times, call in zip(found, calls):
            times.append(measured(duration, call, device))
    return [statistics.median(times[2:]) for times in found]
