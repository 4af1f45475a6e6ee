"""exercises: every check takes right answers and names the fault of wrong ones (tests/answers/ holds them); a solution
replaces empty stubs only."""

import importlib
import re
from pathlib import Path

import pytest

from refiner_min import exercises, model
from refiner_min.exercises import WrongAnswer, solution_of

NOTEBOOKS = ("attention", "expansion", "local_conv", "relabeling", "full_training")
CHECKS, RIGHT, WRONG = {}, [], []
for notebook in NOTEBOOKS:
    checks, answers = (importlib.import_module(f"{package}.{notebook}")
                       for package in ("refiner_min.exercises", "tests.answers"))
    CHECKS |= {name.removeprefix("check_"): check for name, check in vars(checks).items() if name.startswith("check_")}
    RIGHT += [(name, answer) for name, found in answers.RIGHT.items() for answer in found]
    WRONG += answers.WRONG


@pytest.mark.parametrize("name, answer", RIGHT)
def test_a_right_answer_is_taken(name, answer, capsys):
    CHECKS[name](answer)
    assert capsys.readouterr().out == "right\n"


@pytest.mark.parametrize("name, answer, message", WRONG)
def test_a_wrong_answer_is_told_its_fault(name, answer, message):
    with pytest.raises(WrongAnswer, match=message):
        CHECKS[name](answer)


def test_every_check_has_right_answers_and_two_wrong_ones():
    assert CHECKS.keys() == {name for name, _ in RIGHT}
    assert all(sum(name == wrong for wrong, *_ in WRONG) >= 2 for name in CHECKS)
    files = (Path(exercises.__file__).parent).glob("*.py")
    assert {path.stem for path in files} == {"__init__", *NOTEBOOKS}


@pytest.mark.parametrize("name, cls", [("refinement_forward", model.Refinement), ("pair_forward", model.Attention)])
def test_a_check_leaves_the_class_of_the_package_as_it_is(name, cls):
    before = dict(vars(cls))
    with pytest.raises(WrongAnswer):
        CHECKS[name](lambda self, x, handed=None: x)
    assert dict(vars(cls)) == before


def test_half_of_the_wrong_answers_get_a_sentence_of_their_own():
    own = [message for *_, message in WRONG if not re.match("its numbers differ|the shape|for token", message)]
    assert len(own) >= len(WRONG) / 2


def test_a_solution_takes_the_place_of_an_empty_stub_only():
    def empty(x):
        """Your turn."""
        ...

    def answered(x):
        return x + 1

    def begun(x):
        return ...

    def solution(x):
        return x + 2

    assert solution_of(empty)(solution) is solution
    assert solution_of(answered)(solution) is answered
    assert solution_of(begun)(solution) is begun


def test_a_fault_is_shown_without_a_traceback():
    assert WrongAnswer("it is transposed")._render_traceback_() == ["not yet: it is transposed"]
