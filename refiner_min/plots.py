"""Every picture that a command or a notebook draws: numbers in, a matplotlib Figure out. It imports no other module
of the package. The colours are told apart by colour-blind eyes too."""

import math

import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from refiner_min import replacing

STAGES = {"raw": "before expansion", "expanded": "after expansion", "convolved": "after local convolution",
          "refined": "after reduction"}
BLUE, ORANGE = "#0072b2", "#d55e00"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#f0e442")  # of Okabe and Ito
CATEGORIES = ("#3f90da", "#ffc33b", "#a40122", "#00fccf", "#8400cd", "#ff6e3a", "#44aa99", "#ffb2fd", "#ee3377",
              "#9f0162")  # of the palettes of Krzywinski, Tol and Petroff, far from each other and from grey
OTHER = "#dddddd"
SURE = 0.5  # a label above it has its class's name printed on it, where names are short


def save_figure(figure: Figure, path):
    """Write figure as PNG, whole or not at all. UserError: path cannot be written."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def training_curves(history: list[dict], title: str) -> Figure:
    """Loss and accuracy by epoch, from the rows of metrics.csv."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], color=BLUE, marker=".", label="training")
    loss.plot(epochs, [row["val_loss"] for row in history], color=ORANGE, marker=".", label="validation")
    loss.set(xlabel="epoch", ylabel="loss a picture (nats)", ylim=(0, None))  # training's with the patch tokens' part
    loss.legend(frameon=False)
    for name, label, color in (("val_accuracy", "pictures", ORANGE), ("val_token_accuracy", "patch tokens", BLUE)):
        if name in history[0]:
            values = [100 * row[name] for row in history]
            accuracy.plot(epochs, values, color=color, marker=".", label=f"{label}, {values[-1]:.1f} % at the end")
    accuracy.legend(frameon=False, loc="lower right")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 101))
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def explanation(image, names: list[str], probabilities: list[float], maps: dict) -> Figure:
    """A picture, its likeliest classes, and the class token's attention over it, block by block and stage by stage.

    image (S, S) or (S, S, 3), an array from 0 to 1. names and probabilities: likeliest first.
    maps: {block: {stage of STAGES: (grid, grid) tensor}}.
    """
    stages = [stage for stage in STAGES if any(stage in found for found in maps.values())]
    figure = Figure(figsize=(3.9 + 2.1 * len(stages), max(4.8, 0.8 + 2.1 * len(maps))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.6, 2.1 * len(stages)))
    photo, chances = left.subplots(2, 1, height_ratios=(3, 2))
    photo.imshow(image, cmap="gray", vmin=0, vmax=1)
    photo.set_title(f"{names[0]}, {probabilities[0]:.0%}")
    photo.axis("off")
    chances.barh(range(len(names)), [100 * value for value in probabilities], color=BLUE)
    chances.set_yticks(range(len(names)), names)
    chances.set(xlabel="probability (%)", xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))  # the likeliest above
    chances.spines[["top", "right"]].set_visible(False)
    grid = right.subplots(len(maps), len(stages), squeeze=False)
    for row, (block, found) in zip(grid, maps.items()):
        for axes, stage in zip(row, stages):
            axes.set(xticks=[], yticks=[])
            if stage in found:
                _overlay(axes, image, found[stage])
            else:
                axes.axis("off")
            if block == next(iter(maps)):
                axes.set_title(STAGES[stage] if len(stages) > 1 else "attention", fontsize="small")
        row[0].set_ylabel(f"block {block}", fontsize="small")
    figure.suptitle("where the class token looks: mean over maps, each scaled, orange where negative", size="medium")
    return figure


def _overlay(axes, image, attention):
    """An attention map (grid, grid) over its picture in grey; one with negative entries in two colours, around zero."""
    smooth = F.interpolate(attention[None, None], image.shape[:2], mode="bilinear")[0, 0]
    signed, top = bool(attention.min() < 0), attention.abs().max().item()
    axes.imshow(image if image.ndim == 2 else image.mean(-1), cmap="gray", vmin=0, vmax=1)
    axes.imshow(smooth.numpy(), alpha=0.65, **dict(cmap="PuOr", vmin=-top, vmax=top) if signed else dict(cmap="magma"))


def looks_over(image, looks: dict[str, list], place: tuple[int, int] | None = None) -> Figure:
    """Maps over their picture (3, S, S) from -1 to 1, which comes first: {name: maps (grid, grid)}, a row a name, each
    map on its own scale. place: (row, column) of a patch that is marked."""
    columns = 1 + max(map(len, looks.values()))
    figure, grid = _grid(columns * len(looks), columns, 0.95)
    image = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()  # (S, S, 3)
    grid[0].imshow(image)
    for row, (name, maps) in enumerate(looks.items()):
        places = grid[row * columns:][:1 + len(maps)]
        places[1].set_title(name, fontsize="small", loc="left")
        for axes, attention in zip(places[1:], maps):
            _overlay(axes, image, attention)
        side = len(image) // len(maps[0])
        for axes in places[row > 0:] if place else []:
            axes.add_patch(Rectangle((place[1] * side, place[0] * side), side, side, fill=False, edgecolor=BLUE))
    return figure


def label_maps(pictures: list, labels, names: list[str], titles: list[str]) -> Figure:
    """Pictures (S, S, 3) with the likeliest class of each token as a colour over them, the surer the stronger.

    labels (n, T, K): probabilities, all zero where a token has no label. Up to ten classes have the same colours in
    every picture; of more, those that are seen most have one, and others are pale grey. Where names have at most two
    characters, they stand on the tokens whose label is above SURE.
    """
    sure, likeliest = labels.max(dim=2)  # (n, T)
    order = torch.arange(labels.shape[2])
    if len(order) > len(CATEGORIES):
        order = torch.bincount(likeliest[sure > 0].flatten(), minlength=len(order)).argsort(descending=True)
    colours = {int(index): colour for index, colour in zip(order, CATEGORIES)}
    side = round(labels.shape[1] ** 0.5)
    figure, grid = _grid(len(pictures), 4, 2.6)
    figure.set_figheight(figure.get_figheight() + 0.7)  # for the legend
    for axes, picture, classes, strength, title in zip(grid, pictures, likeliest, sure, titles):
        axes.imshow(picture, cmap="gray", extent=(0, side, side, 0))
        overlay = [to_rgba(colours.get(int(index), OTHER), 0.75 * float(value))
                   for index, value in zip(classes, strength)]
        axes.imshow(torch.tensor(overlay).unflatten(0, (side, side)).numpy(), extent=(0, side, side, 0))
        for place in (strength > SURE).nonzero().flatten().tolist() if max(map(len, names)) <= 2 else []:
            axes.text(place % side + 0.5, place // side + 0.52, names[classes[place]], color="white", fontsize=8,
                      ha="center", va="center", path_effects=[withStroke(linewidth=1.5, foreground="black")])
        axes.set_title(title, fontsize="small")
    shown = [index for index in colours if (likeliest[sure > 0] == index).any()]
    figure.legend(handles=[Patch(color=colours[index], label=names[index]) for index in shown],
                  loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# In the notebooks


def pictures(images, titles: list[str], columns: int = 8, boxes=None) -> Figure:
    """Images (n, 1 or 3, S, S) from -1 to 1 side by side, each with its box (x1, y1, x2, y2 as fractions) if given."""
    figure, grid = _grid(len(images), columns, 1.3)
    for index, (axes, image, title) in enumerate(zip(grid, images, titles)):
        axes.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1,
                    extent=(0, 1, 1, 0))
        axes.set_title(title, fontsize="small")
        if boxes is not None:
            x1, y1, x2, y2 = boxes[index].tolist()
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=ORANGE, linewidth=2))
    return figure


def token_row(image) -> Figure:
    """An image (1, S, S) from -1 to 1 in 4 x 4 patches, and under it the row of 17 tokens that they become, the class
    token in front; what stands in one row of the picture has one colour."""
    size = image.shape[1] // 4
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    places = figure.subplot_mosaic([["."] * 6 + ["picture"] * 5 + ["."] * 6, list(range(17))], height_ratios=(4.5, 1))
    whole = places["picture"]
    whole.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, extent=(0, 4, 4, 0))
    whole.set_title("16 patches", fontsize="medium")
    places[0].text(0.5, 0.5, "class", ha="center", va="center", fontsize="x-small")
    places[0].set(xlim=(0, 1), ylim=(0, 1), aspect=1)
    places[8].set_title("17 tokens", fontsize="medium")
    for axes in places.values():
        axes.set(xticks=[], yticks=[])
    for token in range(1, 17):
        row, column = divmod(token - 1, 4)
        colour = (BLUE, *CATEGORIES[1:3], CATEGORIES[4])[row]
        whole.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=2))
        whole.text(column + 0.14, row + 0.14, str(token), fontsize="x-small", va="top",
                   bbox=dict(facecolor="white", edgecolor="none", pad=1))
        patch = image[0, row * size:(row + 1) * size, column * size:(column + 1) * size]
        places[token].imshow(patch.numpy(), cmap="gray", vmin=-1, vmax=1)
        places[token].spines[:].set(edgecolor=colour, linewidth=2)
    for token in range(17):
        places[token].set_xlabel(str(token), fontsize="small")
    return figure


def attention_over(images, looks: list, names: list[str], label: str = "") -> Figure:
    """Images (n, 1, S, S) from -1 to 1, a row each: alone, and as the outline of its ink (what is above 0) over its
    patches, coloured by what each gets of the attention, all on one scale. looks: n lists of (grid, grid); names: one
    for each of a list."""
    columns = 1 + len(names)
    figure, places = _grid(columns * len(images), columns, 1.2)
    figure.set_figheight(1.25 * len(images) + 0.25)
    top = max(float(look.max()) for row in looks for look in row)
    colours = LinearSegmentedColormap.from_list("attention", ["white", ORANGE])
    for index, axes in enumerate(places):
        row, column = divmod(index, columns)
        image = images[row, 0]
        if column:
            look = F.interpolate(looks[row][column - 1][None, None], image.shape, mode="nearest")[0, 0]
            axes.imshow(look.numpy(), cmap=colours, vmin=0, vmax=top)
            axes.autoscale(False)
            if image.min() < 0 < image.max():  # else there is no outline
                axes.contour(image.numpy(), levels=[0], colors="black", linewidths=1.2)
        else:
            axes.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(names[column - 1] if column and not row else "", fontsize="small")
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=OTHER))
    figure.colorbar(ScalarMappable(Normalize(0, top), colours), ax=list(places), label=label, shrink=0.8)
    return figure


def heatmaps(maps: list, titles: list[str], columns: int = 4, label: str = "", around_zero: bool = False,
             xlabel: str = "key", ylabel: str = "query", top: float | None = None) -> Figure:
    """Matrices side by side, on one scale: what a map says, or, around zero, what is negative in it. The scale ends at
    their greatest entry, or at top if given, where all that is greater looks alike."""
    figure, grid = _grid(len(maps), columns, 2.2 if len(maps) > 3 else 3.2)
    extend = "neither" if top is None else "max"
    top = max(float(values.abs().max()) for values in maps) if top is None else top
    for index, (axes, values, title) in enumerate(zip(grid, maps, titles)):
        axes.axis("on")
        axes.tick_params(labelsize="x-small")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel(xlabel if index >= len(maps) - columns else "", fontsize="small")  # below the last row
        axes.set_ylabel(ylabel if index % columns == 0 else "", fontsize="small")  # beside the first column
        shown = axes.imshow(values.numpy(), cmap="PuOr" if around_zero else "viridis", vmin=-top if around_zero else 0,
                            vmax=top)
        axes.set_title(title, fontsize="small")
    figure.colorbar(shown, ax=list(grid), label=label, shrink=0.8, extend=extend)
    return figure


def lines(series: dict[str, tuple[list, list]], xlabel: str, ylabel: str, **limits) -> Figure:
    """Curves by their names, {name: (x, y)}; several have a legend above, where it hides no line. ValueError: more
    than there are colours."""
    figure, axes = _chart(series, 3.2 + 0.2 * len(series))
    for (name, (x, y)), colour, marker in zip(series.items(), SERIES, "os^Dv*Xp"):
        axes.plot(x, y, color=colour, marker=marker, markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=1 if len(series) <= 4 else 2, frameon=False)
    return figure


def points(series: dict[str, tuple[list, list]], xlabel: str, ylabel: str, **limits) -> Figure:
    """Points by their names, {name: (x, y)}. ValueError: more than there are colours."""
    figure, axes = _chart(series, 3.4)
    for (name, (x, y)), colour, marker in zip(series.items(), SERIES, "os^Dv*Xp"):
        axes.plot(x, y, marker, color=colour, alpha=0.8, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure


def bars(series: dict[str, list], names: list[str], ylabel: str, **limits) -> Figure:
    """Bars by their names, {name: heights}, in as many groups as there are names below them. ValueError: more names
    than there are colours."""
    figure, axes = _chart(series, 3.4)
    width = 0.8 / len(series)
    for index, ((name, heights), colour) in enumerate(zip(series.items(), SERIES)):
        left = (index - (len(series) - 1) / 2) * width
        drawn = axes.bar([place + left for place in range(len(names))], heights, 0.9 * width, color=colour, label=name)
        axes.bar_label(drawn, fmt=lambda height: f"{height:.2f}" if abs(height) < 1 else f"{height:.3g}")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=ylabel, **limits)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure


def differences(by_seed: dict[str, list], places: list, xlabel: str, ylabel: str, mean: bool = True) -> Figure:
    """Differences of several seeds, {seed's name: a value at each of the places}: a dot each, against zero, and of
    several seeds their means with two standard errors to either side, unless they are not to be averaged."""
    figure, axes = _chart(by_seed, 3.6)
    values = torch.tensor(list(by_seed.values()), dtype=torch.float64)  # (seeds, places)
    x, mean = torch.arange(len(places)), mean and len(values) > 1
    beside = [0.16 * (index - (len(values) + mean - 1) / 2) for index in range(len(values) + mean)]  # the mean first
    axes.axhline(0, color="black", linewidth=0.8)
    if mean:
        axes.errorbar(x + beside.pop(0), values.mean(dim=0), 2 * values.std(dim=0) / len(values) ** 0.5, fmt="_",
                      color="black", markersize=7, capsize=3, label="mean, two standard errors")
    for (name, found), colour, marker, left in zip(by_seed.items(), SERIES, "os^Dv*Xp", beside):
        axes.plot(x + left, found, marker, color=colour, markersize=5, label=name)
    axes.set_xticks(x, places)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def seeds(panels: dict[str, dict[str, list]], xlabel: str) -> Figure:
    """Curves of several seeds, a panel a measure: {measure: {name: [the values of a seed, ...]}}, the mean bold, each
    seed thin. ValueError: more names than there are colours."""
    names = list(next(iter(panels.values())))
    if len(names) > len(SERIES):
        raise ValueError(f"{len(names)} series, but only {len(SERIES)} colours")
    figure = Figure(figsize=(max(4.6, 3.4 * len(panels)), 3.4), layout="constrained")
    for axes, (measure, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for (name, runs), colour, marker in zip(series.items(), SERIES, "os^Dv*Xp"):
            runs = torch.tensor(runs)  # (seeds, places)
            for run in runs if len(runs) > 1 else []:
                axes.plot(run.numpy(), color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(runs.mean(dim=0).numpy(), color=colour, marker=marker, markersize=4, linewidth=2, label=name)
        axes.set(xlabel=xlabel, title=measure)
        axes.title.set_fontsize("medium")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def spread(series: dict[str, dict[str, list]], xlabel: str, **limits) -> Figure:
    """A value of several seeds by name and series, {series: {name: values}}: a row a name, a point a seed, and a bar at
    the mean. ValueError: more series than there are colours."""
    names = list(dict.fromkeys(name for found in series.values() for name in found))
    figure, axes = _chart(series, 1.4 + 0.45 * len(names))
    for index, ((label, found), colour, marker) in enumerate(zip(series.items(), SERIES, "os^Dv*Xp")):
        aside = (index - (len(series) - 1) / 2) * 0.3
        for name, values in found.items():
            y = names.index(name) + aside
            axes.plot(values, [y] * len(values), marker, color=colour, alpha=0.6, markersize=6)
            axes.plot([sum(values) / len(values)] * 2, [y - 0.14, y + 0.14], color=colour, linewidth=3)
        axes.plot([], [], marker, color=colour, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, **limits)
    axes.grid(axis="y", color=OTHER, linewidth=0.6)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure


def maps_and_tokens(models: dict[str, dict]) -> Figure:
    """What models are like, beside each other: measures.measure's lists as tensors, {model: {measure: tensor}}."""
    panels = {"head_similarity": "cosine of two heads' maps", "head_similarity_centred": "... without their even part",
              "entropy": "entropy of attention", "distance": "distance of attention (patches)",
              "token_similarity": "cosine of two tokens"}
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(2, 4).flatten()
    for axes, (measure, title) in zip(grid, panels.items()):
        after = measure == "token_similarity"  # the first one: the embedding's
        for (name, found), colour in zip(models.items(), SERIES):
            x = [index + (not after) for index in range(len(found[measure]))]
            axes.plot(x, found[measure].numpy(), color=colour, marker=".", label=name)
        axes.set(xlabel="after block" if after else "block", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(models), frameon=False)
    for axes, (name, found) in zip(grid[len(panels):], models.items()):
        shown = axes.imshow(found["cka"].numpy(), vmin=0, vmax=1, origin="lower")
        axes.set(title=f"CKA of layers, {name}", xlabel="tokens after block", ylabel="tokens after block")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=grid[-1], shrink=0.8)
    for axes in grid[len(panels) + len(models):]:
        axes.axis("off")
    return figure


def sampling(picture, box, cells: int, tokens: int) -> Figure:
    """Where RoIAlign reads a map of cells x cells over its picture (S, S), for the tokens x tokens rectangles of a box
    (x1, y1, x2, y2 as fractions): as many points in each as it is cells wide and high, rounded up."""
    figure = Figure(figsize=(4.4, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, cmap="gray", extent=(0, cells, cells, 0))
    axes.set(xlabel="cell", ylabel="cell", xticks=range(cells + 1), yticks=range(cells + 1))
    axes.grid(color=OTHER, alpha=0.5)
    x1, y1, x2, y2 = (cells * float(side) for side in box)
    points = [[start + (end - start) * (index + 0.5) / count for index in range(count)] for start, end, count in
              ((start, end, tokens * math.ceil((end - start) / tokens)) for start, end in ((x1, x2), (y1, y2)))]
    for index in range(tokens + 1):
        x, y = x1 + (x2 - x1) * index / tokens, y1 + (y2 - y1) * index / tokens
        axes.plot([x, x], [y1, y2], color=ORANGE, linewidth=2)
        axes.plot([x1, x2], [y, y], color=ORANGE, linewidth=2)
    axes.plot(*zip(*((x, y) for y in points[1] for x in points[0])), "o", color=SERIES[4], markersize=4)
    return figure


def _chart(series: dict, height: float):
    """A figure, and axes for so many series. ValueError: more than there are colours."""
    if len(series) > len(SERIES):
        raise ValueError(f"{len(series)} series, but only {len(SERIES)} colours")
    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _grid(count: int, columns: int, size: float):
    """A figure with so many places for pictures, no more than columns in a row."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(size * columns, (size + 0.25) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    return figure, grid
