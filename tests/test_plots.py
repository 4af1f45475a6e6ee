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
