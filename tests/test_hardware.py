"""hardware.py: the device that is asked for, its number format, and the cores that may be used."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from refiner_min import UserError, hardware

CPU = torch.device("cpu")


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device nonsense cannot be used here"):
        hardware.choose_device("nonsense")
    for name in ("meta", "hpu", "lazy", "opengl", "cuda:-1", "", "é"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            hardware.choose_device(name)
    assert hardware.choose_device("cpu") == CPU


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux and glibc")
def test_a_cpu_keeps_the_memory_that_it_frees():
    """In a process of its own: once 200 MB were used a few times, the same again bring no pages of the system's."""
    code = """
import resource, sys, torch
from refiner_min import hardware
if sys.argv[1] == "kept":
    hardware.choose_device("cpu")
for turn in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, default = (int(subprocess.run([sys.executable, "-c", code, word], check=True, capture_output=True).stdout)
                     for word in ("kept", "default"))
    assert kept < 100 < default


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    assert hardware.choose_device(None) == CPU
    with pytest.raises(UserError, match="--device cuda cannot be used here"):
        hardware.choose_device("cuda")


@pytest.mark.parametrize("amp, dtype", [("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast(amp, dtype):
    with hardware.autocast(CPU, amp):
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
        found = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert found == (dtype or torch.float32)


@pytest.mark.parametrize("capabilities, seconds, amp", [
    ({"amx_bf16": True}, (1, 9), "bf16"), ({"avx512_bf16": True}, (1, 4), "bf16"),
    ({"avx512_bf16": True}, (2, 1), "off"), ({"avx2": True}, None, "off")], ids=str)
def test_bf16_where_the_processor_is_faster_in_it(capabilities, seconds, amp, monkeypatch):
    """What has no instructions for it is not even tried."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(hardware, "product_seconds",
                        lambda *dtypes: [seconds[dtype == torch.float32] for dtype in dtypes])
    hardware.bf16_pays.cache_clear()
    assert hardware.hardware_amp(CPU) == amp
    hardware.bf16_pays.cache_clear()


def test_formats_are_timed_in_turns(monkeypatch):
    """A moment in which something else runs, most of one format's products long, does not decide between them."""
    multiplied, times = [], itertools.chain.from_iterable((0, 10 if 5 <= product < 20 else 1) for product in range(32))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(torch, "mm", lambda one, other: multiplied.append(one.dtype))
    assert hardware.product_seconds(torch.bfloat16, torch.float32) == [1, 1]
    assert multiplied == [torch.bfloat16, torch.float32] * 16


def test_the_device_is_described_for_people():
    assert f"{torch.get_num_threads()} threads" in hardware.describe(CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_the_memory_where_the_system_does_not_say_how_much(monkeypatch):
    assert hardware.peak_memory(CPU) > 2**20
    monkeypatch.setattr(hardware.Path, "read_text", lambda path: "VmRSS:\t  123 kB\n")
    assert hardware.peak_memory(CPU) == 0


def test_a_product_takes_some_time():
    assert all(0 < seconds < 10 for seconds in hardware.product_seconds(torch.bfloat16, torch.float32))


@pytest.mark.parametrize("cores, processes, workers", [(2, None, 2), (64, None, 16), (64, 8, 8), (4, 8, 1)])
def test_workers_are_the_cores_over_the_processes(cores, processes, workers, monkeypatch):
    """The cores that this process may use, not those of the machine; without such a limit, the machine's."""
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
        patch.setattr(os, "cpu_count", lambda: 1000)
        assert hardware.available_cores() == cores and hardware.default_workers() == workers
        hardware.check_workers(8 * cores)
        for asked in (-1, 8 * cores + 1):
            with pytest.raises(UserError, match=f"--workers {asked} must be at least 0 and at most {8 * cores}, eight"):
                hardware.check_workers(asked)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert hardware.available_cores() == cores and hardware.default_workers() == workers
