"""plots.py: the figures hold the numbers they were given."""

import pytest
import torch
from PIL import Image

from refiner_min import UserError, plots

HISTORY = [{"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 3 / epoch, "val_accuracy": 1 - 0.5 / epoch}
           for epoch in (1, 2, 3)]


def test_training_curves():
    loss, accuracy = plots.training_curves(HISTORY, "a title").axes
    training, validation = loss.lines
    assert list(training.get_ydata()) == [2, 1, 2 / 3] and list(validation.get_ydata()) == [3, 1.5, 1]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([50, 75, 83.33], abs=0.01)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (loss, accuracy))


def test_training_curves_of_tokens_too():
    history = [row | {"val_token_accuracy": 0.1 * row["epoch"]} for row in HISTORY]
    accuracy = plots.training_curves(history, "a title").axes[1]
    assert list(accuracy.lines[1].get_ydata()) == pytest.approx([10, 20, 30])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == [
        "pictures, 83.3 % at the end", "patch tokens, 30.0 % at the end"]


def test_label_maps():
    """Two of five pictures' tokens coloured by their likeliest class, the surer the stronger; none where none is."""
    labels = torch.zeros(5, 4, 12)
    labels[0, :2, 3] = torch.tensor([1.0, 0.5])
    labels[0, 3, 7] = 1.0
    labels[1, 0, 7] = 1.0
    pictures = [torch.rand(8, 8, 3).numpy() for _ in range(5)]
    figure = plots.label_maps(pictures, labels, [f"class {index}" for index in range(12)], list("abcde"))
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == list("abcde")
    overlay = shown[0].images[1].get_array()  # (2, 2, 4)
    assert overlay[..., 3].flatten().tolist() == pytest.approx([0.75, 0.375, 0, 0.75])
    other = shown[1].images[1].get_array()[0, 0, :3]  # of class 7
    assert (overlay[0, 0, :3] == overlay[0, 1, :3]).all() and (overlay[0, 0, :3] != other).any()
    assert (overlay[1, 1, :3] == other).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class 3", "class 7"]


def test_explanation():
    maps = {1: {stage: torch.rand(4, 4) for stage in plots.STAGES}, 3: {"raw": torch.rand(4, 4)}}
    figure = plots.explanation(torch.rand(32, 32, 3).numpy(), ["cat", "dog"], [0.7, 0.3], maps)
    photo, bars, *grid = figure.axes
    assert photo.get_title() == "cat, 70%"
    assert [label.get_text() for label in bars.get_yticklabels()] == ["cat", "dog"]
    assert [bar.get_width() for bar in bars.patches] == [70, 30]
    assert [axes.get_title() for axes in grid[:4]] == list(plots.STAGES.values())
    assert [len(axes.images) for axes in grid] == [2] * 5 + [0] * 3  # the photo and the map over it, where there is one
    torch.testing.assert_close(torch.tensor(grid[0].images[1].get_array().data).mean(), maps[1]["raw"].mean(),
                               atol=0.1, rtol=0)


def test_save_figure(tmp_path):
    figure = plots.training_curves(HISTORY, "a title")
    plots.save_figure(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1080, 420)
    with pytest.raises(UserError, match="could not be written"):
        plots.save_figure(figure, tmp_path / "none" / "curves.png")
