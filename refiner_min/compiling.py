"""Whether a run's network is compiled by torch.compile: what is asked for, or what a trial finds faster.

Compiling takes a minute or two and pays on some machines, for some models; on two cores of a Xeon S gained nothing by
it (notebooks/results/bench-s-224px-train.json). So a long run that says nothing tries it.
It imports floor, memory, stopwatch, hardware and distributed.
"""

from functools import partial

import torch

from refiner_min import distributed, hardware
from refiner_min.floor import step
from refiner_min.memory import statistics_kept
from refiner_min.stopwatch import duration

MANY = 400  # steps ahead: the four that are timed are a hundredth of them
LONG = 30 * 60  # seconds of training ahead, from which on a trial costs a twentieth at the most
FASTER = 1.1  # so many times as fast the compiled network must be to be kept: less may be noise


def settled(run, wanted: bool | None):
    """An engine.Run, its network compiled if that is wanted and can be done; None: if the run has MANY steps, is LONG,
    and it is FASTER. Says what came of it. The run's numbers begin as they would have; of several processes all agree.
    """
    steps = (run.recipe.epochs * run.steps_per_epoch - run.step) * run.accumulate
    if wanted is False or run.checkpoint_maps or (wanted is None and steps < MANY):
        return run
    eager = None if wanted else max(distributed.gathered(step_seconds(run)))
    if eager is not None and eager * steps < LONG:
        return run
    if eager is not None:
        say("a long run: trying whether torch.compile makes it faster takes a minute or two")
    before = run.wrapped
    seconds, problem = compile_network(run)
    run.compiled = problem is None and (eager is None or FASTER * seconds <= eager)
    run.wrapped = run.wrapped if run.compiled else before
    if problem is not None:
        say(f"not compiled: torch.compile fails here ({problem})")
    elif eager is not None:
        say(f"{'' if run.compiled else 'not '}compiled: {seconds:.3f} s a step then, and {eager:.3f} without")
    return run


def compile_network(run) -> tuple[float, str | None]:
    """The seconds of a step of the run with its network compiled, or why that cannot be done, of all processes."""
    seconds, problem = 0.0, None
    try:
        run.wrapped = torch.compile(run.wrapped)
        seconds = step_seconds(run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # all that torch.compile fails with, be it for want of a compiler
        problem = str(error).strip().splitlines()[0]
    seconds, problems = zip(*distributed.gathered((seconds, problem)))
    return max(seconds), next(filter(None, problems), None)


def say(text: str):
    if distributed.is_main():
        print(text, flush=True)


def step_seconds(run) -> float:
    """The time of a forward and backward pass of the run's network on noise, at its fastest. Nothing of the run
    changes."""
    config = run.model.config
    images = torch.randn(run.local_batch, config.in_channels, config.img_size, config.img_size, device=run.device)
    run.wrapped.train()
    with statistics_kept(run.model), hardware.autocast(run.device, run.recipe.amp):
        found = [duration(partial(step, run.wrapped, True, images), run.device) for _ in range(4)]
    run.optimizer.zero_grad()
    return min(found[1:])  # the first one warms up
