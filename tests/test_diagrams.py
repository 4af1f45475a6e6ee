"""diagrams.py: the drawings say what is so."""

import io

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from refiner_min import diagrams
from refiner_min.plots import BLUE, ORANGE


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def letters(figure, colour: str) -> list[str]:
    """What stands in the squares of a colour."""
    axes = figure.axes[0]
    squares = [patch for patch in axes.patches if type(patch).__name__ == "Rectangle"
               and to_hex(patch.get_facecolor()) == colour]
    return [text.get_text() for square in squares for text in axes.texts
            if square.get_bbox().contains(*text.get_position())]


def test_the_task_is_a_row_in_which_the_answer_is_beside_what_is_shown():
    figure = diagrams.neighbour_task(range(16), 5)
    assert letters(figure, BLUE) == ["F", "F"] and letters(figure, ORANGE) == ["G"]  # in the row, in the class token
    assert {"shown", "answer", "class\ntoken"} <= set(words(figure))


def test_the_task_on_the_grid_has_its_answer_below():
    figure = diagrams.neighbour_task(torch.arange(16), 5, away=4, side=4, reach=1)
    assert letters(figure, BLUE) == ["F"] * 3 and letters(figure, ORANGE) == ["J"] * 2
    shown, answer = ([text.get_position() for text in figure.axes[0].texts if text.get_text() == letter][1]
                     for letter in "FJ")
    assert shown[0] == pytest.approx(answer[0]) and answer[1] - shown[1] == pytest.approx(0.46)  # on the grid
    assert "as far as a kernel of 3 reaches" in words(figure)


def test_the_theorem_is_drawn_as_it_is():
    """V_a takes v_{m-b+1} with w_ab; S_a takes row i+a-1."""
    said = " ".join(words(diagrams.local_then_global()))
    for a in range(3):
        for b, place in enumerate(("m+1", "m", "m-1")):
            assert any(f"w_{{{a}{b}}} v_{end}" in said for end in (f"{{{place}}}", place + " ", place + "$"))
    assert all(text in said for text in ("row $i$ takes row $i-1$", "row $i$ stays", "row $i$ takes row $i+1$"))


def test_a_pair_makes_a_map_once():
    said = words(diagrams.pair_of_blocks())
    assert sum("softmax" in text for text in said) == 2 and sum("refine}" in text for text in said) == 1
    assert sum(text == "$q, k$" for text in said) == 2 and sum(text == "$v$" for text in said) == 3


@pytest.mark.parametrize("figure", [diagrams.neighbour_task(range(16), 0), diagrams.local_then_global(),
                                    diagrams.neighbour_task(range(16), 11, 4, 4, 1), diagrams.pair_of_blocks()])
def test_drawings_stay_on_their_page(figure):
    """And no text is drawn over another."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert min(Image.open(file).size) > 150
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
