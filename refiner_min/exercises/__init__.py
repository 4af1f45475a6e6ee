"""What the notebooks' exercises call, one file a notebook: each check_... takes the reader's function and says what is
wrong with it; here is how they say it.

A solution in a notebook takes the place of a stub only while it is empty (solution_of), so that a notebook runs from
top to bottom and a reader's own answer is what is checked.
"""

import dis

import torch


class WrongAnswer(Exception):
    """What is wrong with an answer, in a sentence; a notebook shows it without a traceback."""

    def _render_traceback_(self):
        return [f"not yet: {self}"]


def solution_of(stub):
    """A decorator that puts a solution in the place of an empty stub, and leaves an answer as it is."""
    def empty():
        ...

    def steps(function):
        return [(step.opname, step.argval) for step in dis.get_instructions(function)]

    return lambda solution: solution if steps(stub) == steps(empty) else stub


def copied(inputs) -> list:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]


def answer(function, *inputs):
    """What the reader's function returns for copies of the inputs, which it may change. WrongAnswer: nothing."""
    found = function(*copied(inputs))
    if found is None:
        raise WrongAnswer("it returned nothing: does it end with a return?")
    return found


def answer_leaving(function, *inputs):
    """What the reader's function returns, where it must leave its inputs as they are: the notebook uses them again.
    WrongAnswer: nothing, or an input has changed."""
    given = copied(inputs)
    found = function(*given)
    if any(isinstance(value, torch.Tensor) and not torch.equal(value, kept) for value, kept in zip(given, inputs)):
        raise WrongAnswer("it changes one of its inputs in place, so the next cell would meet other numbers: compute "
                          "a new tensor")
    return answer(lambda: found)


def number(found) -> float:
    """An answer that must be a number: Python's, or a tensor that holds one. WrongAnswer: it is none."""
    try:
        return float(None if isinstance(found, str) else found)
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"it returned {kind(found)}, not a number") from None


def kind(found) -> str:
    """What an answer is, for a sentence."""
    if isinstance(found, torch.Tensor):
        return f"the shape {tuple(found.shape)}"
    return f"a {type(found).__name__} of {len(found)}" if hasattr(found, "__len__") else repr(found)


def compare(found, expected, faults: dict):
    """Say that found is right. WrongAnswer: it is not; faults: what typical mistakes give, by the sentence that names
    them."""
    compare_quietly(found, expected, faults)
    print("right")


def compare_quietly(found, expected, faults: dict):
    """compare, for one of several cases."""
    if not isinstance(found, torch.Tensor):
        raise WrongAnswer(f"it returned {kind(found)}, not one tensor")
    found = found.detach().to(expected)

    def is_like(tensor):
        return found.shape == tensor.shape and torch.allclose(found, tensor, atol=1e-5, rtol=1e-4)

    if is_like(expected):
        return
    for sentence, wrong in faults.items():
        if is_like(wrong):
            raise WrongAnswer(sentence)
    if found.shape != expected.shape:
        raise WrongAnswer(f"it returned the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    raise WrongAnswer(f"its numbers differ from the right ones by up to {(found - expected).abs().max():.2g}")


def compare_cases(function, cases: list[tuple], right, wrong: dict):
    """Say that function is right: for each case, the inputs of a call, it returns what right does. WrongAnswer: it does
    not; wrong: functions that make typical mistakes, by the sentences that name them."""
    found = [answer(function, *case) for case in cases]
    expected = [right(*case) for case in cases]
    if len(cases) > 1 and all(same(one, found[0]) for one in found) and not same(*expected[:2]):
        raise WrongAnswer("it returns the same for every input: is that a constant?")
    for case, one, other in zip(cases, found, expected):
        compare_quietly(one, other, {sentence: of(*case) for sentence, of in wrong.items()})
    print("right")


def said_with(words: str, check, *inputs):
    """check(*inputs), whose fault is told with the words that name the case."""
    try:
        check(*inputs)
    except WrongAnswer as fault:
        raise WrongAnswer(f"{words}{fault}") from None


def same(one, other) -> bool:
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and one.shape == other.shape and torch.equal(one, other)


def random(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
