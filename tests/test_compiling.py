"""compiling.py: what is compiled and when, what a resumed run keeps, and that a trial leaves no trace."""

import os
import subprocess
import sys

import pytest
import torch

from refiner_min import compiling, train
from tests.runs import CPU, assert_same_runs, run_of, small


@pytest.fixture
def timed(monkeypatch):
    """The seconds of a step, with the network as it is and compiled; torch.compile and the clock are stood in for."""
    monkeypatch.setattr(torch, "compile", lambda network, compile=torch.compile: compile(network, backend="eager"))
    seconds = {False: 1.0, True: 0.5}
    monkeypatch.setattr(compiling, "step_seconds", lambda run: seconds[run.wrapped is not run.model])
    return seconds


def long_run(pictures, *flags):
    """Of as many steps, two an epoch, as LONG has seconds."""
    return run_of(pictures, "--epochs", str(compiling.LONG // 2), *flags)


def test_a_short_run_is_not_tried(pictures, timed, capsys):
    timed[False] = 1e9
    few = str(compiling.MANY // 2 - 1)  # epochs of two steps
    for run in (run_of(pictures), run_of(pictures, "--epochs", few)):
        assert not run.compiled and run.wrapped is run.model
    assert "compile" not in capsys.readouterr().out


@pytest.mark.parametrize("faster, compiled", [(1.09, False), (1.11, True)])
def test_a_long_run_keeps_what_is_faster(pictures, timed, capsys, faster, compiled):
    timed[True] = 1 / faster
    run = long_run(pictures)
    shown = capsys.readouterr().out
    assert run.compiled == compiled == (run.wrapped is not run.model) == run.origin()["compiled"]
    assert f"{'' if compiled else 'not '}compiled: {1 / faster:.3f} s a step then, and 1.000 without" in shown


def test_how_long_is_long(pictures, timed):
    """By the steps ahead, of which each is several passes with --accumulate."""
    timed.update({False: 0.999, True: 0.1})
    assert not long_run(pictures).compiled
    timed[False] = 0.5
    assert not long_run(pictures).compiled and long_run(pictures, "--accumulate", "2").compiled


def test_what_is_asked_for_is_done(pictures, timed, capsys):
    timed[True] = 2.0
    assert run_of(pictures, "--compile").compiled
    timed[True] = 0.1
    assert not long_run(pictures, "--no-compile").compiled
    assert not long_run(pictures, "--checkpoint-maps").compiled
    assert "compile" not in capsys.readouterr().out.replace("--compile", "")


def test_a_resumed_run_keeps_it(pictures, timed):
    for out, flags in (("with", ["--compile"]), ("without", [])):
        assert train.main(small(pictures, "--out", out, *flags)) == 0
        for again, expected in (([], bool(flags)), (["--compile"], True), (["--no-compile"], False)):
            args, given = train.parse(["--resume", out, "--device", "cpu", *again])
            assert train.resumed_run(args, given, CPU).compiled == expected


def test_a_trial_leaves_no_trace(pictures, monkeypatch):
    """The same run to the last digit as one that was not tried; with every source of chance, and with statistics."""
    flags = ["--cutmix", "1", "--drop-path", "0.2", "--ema", "0.9"]
    assert train.main(small(pictures, "--out", "one", "--no-compile", *flags)) == 0
    monkeypatch.setattr(compiling, "MANY", 0)
    monkeypatch.setattr(compiling, "LONG", 0)
    monkeypatch.setattr(compiling, "FASTER", 1e9)
    monkeypatch.setattr(torch, "compile", lambda network, compile=torch.compile: compile(network, backend="eager"))
    assert train.main(small(pictures, "--out", "two", *flags)) == 0
    assert_same_runs("one", "two")


def test_the_trial_measures_what_it_is_given(pictures, monkeypatch):
    run, passes = run_of(pictures), []
    monkeypatch.setattr(compiling, "step", lambda network, training, images: passes.append((network, images.shape)))
    assert 0 <= compiling.step_seconds(run) < 1
    assert passes == 4 * [(run.model, (10, 3, 16, 16))]


@pytest.mark.slow
def test_a_machine_without_a_compiler_goes_on_without(pictures):
    """In a process of its own, which finds no C++ compiler and no graph that was compiled before."""
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": "cache"}
    command = [sys.executable, "-m", "refiner_min.train", *small(pictures, "--compile", "--out", "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not compiled: torch.compile fails here (" in done.stdout and "accuracy" in done.stdout


def test_memory_that_is_too_small_is_no_want_of_a_compiler(pictures, monkeypatch):
    def too_small(network):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "compile", too_small)
    with pytest.raises(torch.OutOfMemoryError):
        run_of(pictures, "--compile")
