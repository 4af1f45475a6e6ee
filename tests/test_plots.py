"""plots.py: the figures hold the numbers they were given."""

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torchvision.ops import roi_align

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


def test_up_to_ten_classes_have_the_same_colours_in_every_picture():
    colours = []
    for count in (1, 3):  # of four tokens
        labels = torch.zeros(1, 4, 10)
        labels[0, :count, 5] = 1
        labels[0, count:, 2] = 1
        figure = plots.label_maps([torch.rand(8, 8).numpy()], labels, list("0123456789"), ["a"])
        colours.append(figure.axes[0].images[1].get_array()[0, 0].tolist())
    assert colours[0] == colours[1]


def test_short_names_stand_on_the_tokens_whose_label_is_sure():
    labels = torch.zeros(1, 4, 3)
    labels[0, 0, 1], labels[0, 1, 2], labels[0, 3, 2] = 0.9, 0.4, 0.6
    picture = [torch.rand(8, 8).numpy()]
    for names, written in ((["a", "b", "cc"], ["b", "cc"]), (["a", "b", "ccc"], [])):
        axes = plots.label_maps(picture, labels, names, ["a"]).axes[0]
        assert [text.get_text() for text in axes.texts] == written
    axes = plots.label_maps(picture, labels, ["a", "b", "cc"], ["a"]).axes[0]
    assert [tuple(map(int, text.get_position())) for text in axes.texts] == [(0, 0), (1, 1)]  # x, y of tokens 0 and 3


DEUTERANOPIA = torch.tensor([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])  # Machado 2009
TO_XYZ = torch.tensor([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]])  # white: 1, 1, 1


def lab(colours, sight):
    """sRGB from 0 to 1 (n, 3), as eyes of a kind see it -> CIELAB (n, 3)."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = (linear @ sight.T).clamp(0, 1) @ TO_XYZ.T
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def test_the_colours_of_classes_are_far_from_each_other_and_from_grey():
    colours = torch.tensor([to_rgb(colour) for colour in plots.CATEGORIES])
    seen = lab(colours, torch.eye(3))
    assert torch.pdist(seen).min() > 25 and torch.pdist(lab(colours, DEUTERANOPIA)).min() > 15
    assert seen[:, 1:].norm(dim=1).min() > 30  # from the grey of their lightness


def test_differences():
    """Of two seeds at two places: dots, means and two standard errors."""
    axes, = plots.differences({"seed 0": [1, -2], "seed 1": [3, 2]}, ["a", "b"], "x", "y").axes
    zero, means, *dots = axes.lines
    assert set(zero.get_ydata()) == {0}
    assert list(means.get_ydata()) == [2, 0]
    assert [list(line.get_ydata()) for line in dots if line.get_label().startswith("seed")] == [[1, -2], [3, 2]]
    low, high = [collection.get_segments() for collection in axes.collections][0]
    assert [low[0][1], low[1][1]] == pytest.approx([0, 4]) and [high[0][1], high[1][1]] == pytest.approx([-4, 4])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    one, = plots.differences({"seed 0": [1, -2]}, ["a", "b"], "x", "y").axes
    assert not one.collections  # of one seed there is no standard error


def test_heatmaps_are_labelled_at_the_left_and_below_on_one_scale():
    figure = plots.heatmaps([torch.rand(4, 4) / 4] * 4 + [torch.ones(4, 4)], list("abcde"), columns=4)
    *maps, bar = figure.axes
    assert [axes.get_ylabel() for axes in maps[:5]] == ["query", "", "", "", "query"]
    assert [axes.get_xlabel() for axes in maps[:5]] == ["", "key", "key", "key", "key"]  # none below the last three
    assert {axes.images[0].get_clim() for axes in maps[:5]} == {(0, 1)}
    assert bar.get_ylim() == (0, 1)
    assert plots.heatmaps([-torch.ones(2, 2)], ["a"], around_zero=True).axes[0].images[0].get_clim() == (-1, 1)
    cut = plots.heatmaps([torch.ones(2, 2)], ["a"], top=0.5)
    assert cut.axes[0].images[0].get_clim() == (0, 0.5) and cut.axes[0].images[0].colorbar.extend == "max"


def test_token_row_shows_each_patch_below_its_place():
    image = torch.arange(16.0).unflatten(0, (4, 4)).repeat_interleave(2, 0).repeat_interleave(2, 1)[None] / 8 - 1
    whole, *tokens = plots.token_row(image).axes
    assert [text.get_text() for text in whole.texts] == [str(index) for index in range(1, 17)]
    assert [axes.get_xlabel() for axes in tokens] == [str(index) for index in range(17)]
    assert [text.get_text() for text in tokens[0].texts] == ["class"] and not tokens[0].images
    for index, (axes, square) in enumerate(zip(tokens[1:], whole.patches)):
        assert (axes.images[0].get_array() == index / 8 - 1).all()
        assert square.get_edgecolor() == axes.spines["left"].get_edgecolor()
        x, y = square.get_center()
        assert image[0, int(2 * y), int(2 * x)] == index / 8 - 1  # of a picture of 8 x 8 shown as 4 x 4


def test_attention_over_colours_the_patches_by_their_weight_on_one_scale_under_the_outline_of_the_ink():
    images = torch.stack([-torch.ones(1, 4, 4), torch.full((1, 4, 4), -1.0)])
    images[1, 0, 1:3, 1:3] = 1  # no ink, and a square of it
    none, half, all_of_it = torch.zeros(2, 2), torch.tensor([[0.0, 0.2], [0.1, 0.0]]), torch.full((2, 2), 0.4)
    figure = plots.attention_over(images, [[none, half], [half, all_of_it]], ["a", "b"], "weight")
    *places, bar = figure.axes
    assert [axes.get_title() for axes in places] == ["", "a", "b", "", "", ""]
    assert bar.get_ylabel() == "weight" and bar.get_ylim() == pytest.approx((0, 0.4))
    shown = [axes.images[0] for axes in places]
    for alone, image in ((shown[0], images[0, 0]), (shown[3], images[1, 0])):  # as the other pictures: ink is white
        assert (torch.tensor(alone.get_array()) == image).all()
        assert alone.get_clim() == (-1, 1) and alone.get_cmap().name == "gray"
    large = half.repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = [torch.zeros(4, 4), large, large, torch.full((4, 4), 0.4)]
    for overlay, values in zip([shown[1], shown[2], shown[4], shown[5]], expected):
        assert (torch.tensor(overlay.get_array()) == values).all() and overlay.get_clim() == pytest.approx((0, 0.4))
        assert overlay.get_cmap()(0.0)[:3] == (1, 1, 1) and overlay.get_cmap()(1.0)[:3] == to_rgb(plots.ORANGE)
    outlines = [[path for drawn in axes.collections for path in drawn.get_paths()] for axes in places]
    assert [len(paths) for paths in outlines] == [0, 0, 0, 0, 1, 1]  # over the weights, and where there is ink
    low, high = outlines[5][0].vertices.min(axis=0), outlines[5][0].vertices.max(axis=0)
    assert list(low) == [0.5, 0.5] and list(high) == [2.5, 2.5]  # half way from paper to ink
    assert places[5].get_xlim() == (-0.5, 3.5) and places[5].get_ylim() == (3.5, -0.5)


def test_lines_and_bars():
    axes, = plots.lines({"a": ([0, 1], [2, 3]), "b": ([0, 1], [4, 5])}, "x", "y", ylim=(0, 9)).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[2, 3], [4, 5]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()) == ("x", "y", (0, 9))
    figure = plots.bars({"a": [1, 0.25], "b": [88.64, -0.5]}, ["left", "right"], "y")
    axes, = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [1, 0.25, 88.64, -0.5]
    assert [text.get_text() for text in axes.texts] == ["1", "0.25", "88.6", "-0.50"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["left", "right"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="9 series, but only 8 colours"):
        plots.lines({str(index): ([0], [0]) for index in range(9)}, "x", "y")
    places = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert places == pytest.approx([-0.2, 0.8, 0.2, 1.2])  # of a and b, beside each other


def test_sampling_shows_where_roi_align_reads():
    """Of a map whose cells hold their own place, RoIAlign gives the mean of the points that are drawn in a token."""
    box, cells, tokens = (0.2, 0.1, 0.9, 0.6), 10, 4
    axes, = plots.sampling(torch.rand(20, 20).numpy(), box, cells, tokens).axes
    points = torch.tensor(axes.lines[-1].get_xydata())
    assert len(points) == tokens**2 * 2 * 2  # a token is 1.75 cells wide and 1.25 high
    place = torch.arange(cells, dtype=torch.float64) + 0.5
    places = torch.stack(torch.meshgrid(place, place, indexing="xy"))[None]  # (1, x and y, 10, 10)
    roi = torch.tensor([[0, *(cells * side for side in box)]], dtype=torch.float64)
    read = roi_align(places, roi, tokens, aligned=True)[0].flatten(1).T  # (T, 2)
    drawn = points.unflatten(0, (tokens, 2, tokens, 2)).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(drawn, read)


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


def test_looks_over_shows_each_map_over_the_picture_and_marks_the_patch():
    image, raw = torch.rand(3, 16, 16) * 2 - 1, [torch.rand(4, 4), torch.rand(4, 4)]
    refined = [torch.rand(4, 4) - 0.7, torch.rand(4, 4), torch.rand(4, 4)]
    figure = plots.looks_over(image, {"raw": raw, "refined": refined}, place=(1, 2))
    picture, *first, _, empty, a, b, c = figure.axes
    assert torch.allclose(torch.tensor(picture.images[0].get_array().data), image.permute(1, 2, 0) / 2 + 0.5)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["", "raw", "", "", "", "refined", "", ""]
    for axes, values in zip([*first, a, b, c], raw + refined):
        photo, shown = axes.images
        smooth = torch.nn.functional.interpolate(values[None, None], (16, 16), mode="bilinear")[0, 0]
        assert torch.equal(torch.tensor(shown.get_array().data), smooth)
        assert tuple(axes.patches[0].get_bbox().bounds) == (8, 4, 4, 4)
    assert a.images[1].get_cmap().name == "PuOr" and b.images[1].get_cmap().name == "magma"  # negative entries, none
    assert sum(a.images[1].get_clim()) == 0 and a.images[1].get_clim()[1] >= -refined[0].min()
    assert len(picture.patches) == 1 and not empty.images and not empty.patches
    assert not any(axes.patches for axes in plots.looks_over(image, {"raw": raw}).axes)


def test_save_figure(tmp_path):
    figure = plots.training_curves(HISTORY, "a title")
    plots.save_figure(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1080, 420)
    with pytest.raises(UserError, match="could not be written"):
        plots.save_figure(figure, tmp_path / "none" / "curves.png")


def test_seeds():
    """The mean of two seeds bold, each thin; one seed alone is no mean."""
    figure = plots.seeds({"a measure": {"plain": [[0.0, 1.0], [2.0, 3.0]], "refined": [[5.0, 6.0]]},
                          "another": {"plain": [[1.0], [3.0]], "refined": [[0.0]]}}, "block")
    first, second = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[0, 1], [2, 3], [1, 2], [5, 6]]
    assert [list(line.get_ydata()) for line in second.lines] == [[1], [3], [2], [0]]
    assert first.lines[2].get_linewidth() > first.lines[0].get_linewidth()
    assert first.lines[0].get_color() == first.lines[2].get_color() != first.lines[3].get_color()
    assert (first.get_title(), second.get_title(), first.get_xlabel()) == ("a measure", "another", "block")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "refined"]
    with pytest.raises(ValueError, match="9 series"):
        plots.seeds({"": {str(index): [[0.0]] for index in range(9)}}, "")


def test_spread():
    axes = plots.spread({"right": {"plain": [1.0, 3.0], "linear": [8.0]}, "below": {"linear": [2.0]}}, "%").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "linear"]
    found = [(list(line.get_xdata()), [round(float(y)) for y in line.get_ydata()]) for line in axes.lines]
    assert found[0] == ([1, 3], [0, 0]) and found[1][0] == [2, 2] and found[2] == ([8], [1])
    assert found[5] == ([2], [1]) and axes.lines[0].get_color() != axes.lines[5].get_color()
    assert axes.yaxis_inverted() and axes.get_xlabel() == "%"


def test_points():
    axes = plots.points({"plain": ([1, 2], [3, 4]), "refined": ([5], [6])}, "step", "CKA", ylim=(0, 9)).axes[0]
    assert [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axes.lines] == [
        ([1, 2], [3, 4], "None"), ([5], [6], "None")]
    assert axes.get_ylim() == (0, 9) and axes.lines[0].get_color() != axes.lines[1].get_color()
