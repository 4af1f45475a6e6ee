"""Schematic drawings of the notebooks: boxes and arrows that say how things hang together, where plots draws numbers.
Each gives a matplotlib Figure, in the colours of plots. It imports plots."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from refiner_min.plots import BLUE, ORANGE, OTHER

GREY, PALE = "#555555", "#f4f4f4"
ROWS = (BLUE, GREY, ORANGE)  # of a 3 x 3 kernel


def _canvas(width: float, height: float):
    """A figure of one axes whose units are inches, from the top left corner down."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _box(axes, x: float, y: float, width: float, height: float, text: str, colour: str = GREY, fill: str = PALE,
         size: float = 9):
    """A box whose middle is (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=fill, edgecolor=colour,
                                  linewidth=1.4, boxstyle="round,pad=0,rounding_size=0.06"))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.4)


def _arrow(axes, start, end, colour: str = GREY, bend: float = 0.0):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.4,
                                   shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}"))


def neighbour_task(symbols, shown: int, away: int = 1, side: int | None = None, reach: int | None = None) -> Figure:
    """The task of neighbour.py: the class token that shows the symbol at place `shown` of the row, and the row, with
    the answer `away` places further on. symbols: numbers, A for 0. side: the row as a grid of that side above it.
    reach: how far to each side a kernel joins places of the row."""
    letters = [chr(ord("A") + int(symbol)) for symbol in symbols]
    cell, top = 0.46, 0.8 if side is None else 0.45 + 0.46 * side + 0.9
    figure, axes = _canvas(0.7 + cell * (len(letters) + 2.3), top + (1.05 if reach is None else 1.4))
    fills = {shown: (BLUE, "white"), shown + away: (ORANGE, "white")}

    def place(x, y, letter, fill, text):
        axes.add_patch(Rectangle((x, y), cell, cell, facecolor=fill, edgecolor="white", linewidth=2))
        axes.text(x + cell / 2, y + cell / 2, letter, ha="center", va="center", fontsize=12, color=text)

    left = 0.3 + 1.6 * cell
    for index, letter in enumerate(letters):
        fill, text = fills.get(index, (OTHER, "black"))
        place(left + cell * index, top, letter, fill, text)
        if side is not None:
            grid_left = left + cell * (len(letters) - side) / 2
            place(grid_left + cell * (index % side), 0.45 + cell * (index // side), letter, fill, text)
    place(0.3, top, letters[shown], BLUE, "white")
    axes.text(0.3 + cell / 2, top + cell + 0.17, "class\ntoken", ha="center", va="top", fontsize=9)
    here, there = (left + cell * (index + 0.5) for index in (shown, shown + away))
    start, bend = 0.3 + cell / 2, 0.12
    _arrow(axes, (start, top - 0.04), (here, top - 0.04), BLUE, bend=-bend)
    axes.text(max((start + here) / 2, 1.55), top - 0.1 - bend * (here - start) / 2,
              "attention finds the symbol that is shown", color=BLUE, fontsize=9, ha="center", va="bottom")
    for x, text, colour, aside in ((here, "shown", BLUE, "right"), (there, "answer", ORANGE, "left")):
        edge = cell * (0.45 if aside == "right" else -0.45) if away == 1 else 0  # neighbours make room for each other
        axes.text(x + edge, top + cell + 0.17, text, ha=aside if away == 1 else "center", va="top", fontsize=9,
                  color=colour)
    if side is not None:
        axes.text(left + cell * len(letters) / 2, 0.3, f"the same on a grid of {side} x {side}: the answer is below",
                  ha="center", fontsize=9)
    if reach is not None:
        low, high = here - cell * (reach + 0.5), here + cell * (reach + 0.5)
        y = top + cell + 0.6
        axes.plot([low, low, high, high], [y - 0.08, y, y, y - 0.08], color=GREY, linewidth=1.4)
        axes.text(here, y + 0.1, f"as far as a kernel of {2 * reach + 1} reaches", ha="center", va="top", fontsize=9)
    return figure


def local_then_global() -> Figure:
    """The theorem: the sum over the rows a of a 3 x 3 kernel of S_a A V_a, each row in its own colour."""
    figure, axes = _canvas(9.4, 4.1)
    columns, rows = (0.95, 2.95, 5.1, 7.05), (1.15, 2.15, 3.15)
    for x, text in zip(columns, ("a kernel $w$", "1. local: values of\nneighbours are added up",
                                 "2. global: attention\ngathers them", "3. queries hand it on\nto neighbours")):
        axes.text(x, 0.4, text, ha="center", va="center", fontsize=9)
    moves = ("row $i$ takes row $i-1$", "row $i$ stays", "row $i$ takes row $i+1$")
    for a, (y, colour, move) in enumerate(zip(rows, ROWS, moves)):
        for b in range(3):
            axes.add_patch(Rectangle((0.38 + 0.38 * b, y - 0.19), 0.38, 0.38, facecolor=colour, edgecolor="white"))
            axes.text(0.57 + 0.38 * b, y, f"$w_{{{a}{b}}}$", ha="center", va="center", color="white", fontsize=9)
        _arrow(axes, (1.58, y), (1.98, y), colour)
        _box(axes, columns[1], y, 1.9, 0.72, f"$(V_{a})_m = w_{{{a}0}} v_{{m+1}}$\n"
             f"$+\\, w_{{{a}1}} v_m + w_{{{a}2}} v_{{m-1}}$", colour)
        _arrow(axes, (3.92, y), (4.42, y), colour)
        _box(axes, columns[2], y, 1.3, 0.72, f"$A\\, V_{a}$", colour, size=11)
        _arrow(axes, (5.77, y), (6.12, y), colour)
        _box(axes, columns[3], y, 1.8, 0.72, f"$S_{a} A\\, V_{a}$\n{move}", colour)
        _arrow(axes, (7.97, y), (8.42, rows[1] + 0.16 * (a - 1)), colour)
    _box(axes, 8.85, rows[1], 0.8, 0.72, "sum:\n$(w * A)\\,V$")
    axes.text(4.7, 3.85, "The kernel's columns $b$ reach along the values (the keys); its rows $a$ reach along the "
              "queries.", ha="center", va="center", fontsize=9, color=GREY)
    return figure


def pair_of_blocks() -> Figure:
    """The published model's pair of blocks, and the first block of the next pair: what becomes of tokens and maps."""
    figure, axes = _canvas(9.6, 4.2)
    middle, maps, gathers, tokens = (2.35, 5.25, 8.15), 1.35, 2.4, 3.5
    axes.text(0.1, maps, "maps", va="center", fontsize=10, color=GREY)
    axes.text(0.1, tokens, "tokens", va="center", fontsize=10, color=GREY)
    titles = ("block 0: makes a map", "block 1: refines the map", "block 2: makes a map")
    made = (r"$A = \mathrm{softmax}(s\,QK^\top)$", r"$A' = \mathrm{refine}(A)$",
            r"$\mathrm{softmax}(s\,QK^\top) + s\,A$")
    layers = ("$q, k, v$ from the tokens", "only $v$ from the tokens", "$q, k, v$ from the tokens")
    for x, title, formula, layer in zip(middle, titles, made, layers):
        colour = ORANGE if x == middle[1] else BLUE
        axes.add_patch(Rectangle((x - 1.2, 0.42), 2.4, 3.5, facecolor="none", edgecolor=OTHER, linewidth=1.4))
        axes.text(x, 0.22, title, ha="center", va="center", fontsize=10, color=colour)
        _box(axes, x, maps, 2.1, 0.5, formula, colour)
        _box(axes, x + 0.25, gathers, 1.6, 0.5, "gathers $v$ with $A'$" if colour == ORANGE else "gathers $v$ with it",
             colour)
        _box(axes, x, tokens, 2.1, 0.5, layer)
        _arrow(axes, (x + 0.25, maps + 0.25), (x + 0.25, gathers - 0.25), colour)
        _arrow(axes, (x + 0.25, tokens - 0.25), (x + 0.25, gathers + 0.25))
        axes.text(x + 0.32, (tokens + gathers) / 2, "$v$", va="center", fontsize=9)
        if colour == BLUE:
            _arrow(axes, (x - 0.8, tokens - 0.25), (x - 0.8, maps + 0.25))
            axes.text(x - 0.73, (tokens + gathers) / 2, "$q, k$", va="center", fontsize=9)
    _arrow(axes, (0.75, tokens), (middle[0] - 1.05, tokens))
    for x, other in zip(middle, middle[1:]):  # the residual: tokens and what was gathered for them
        _arrow(axes, (x + 1.05, tokens), (other - 1.05, tokens))
        axes.plot([x + 1.05, x + 1.45], [gathers, gathers], color=GREY, linewidth=1.4)
        _arrow(axes, (x + 1.45, gathers), (x + 1.45, tokens - 0.1))
        axes.text(x + 1.45, tokens, "+", ha="center", va="center", fontsize=9,
                  bbox=dict(boxstyle="circle,pad=0.15", facecolor=PALE, edgecolor=GREY))
    _arrow(axes, (middle[0] + 1.05, maps), (middle[1] - 1.05, maps), BLUE)
    axes.plot([middle[0], middle[0], middle[2]], [maps - 0.25, 0.72, 0.72], color=BLUE, linewidth=1.4)
    _arrow(axes, (middle[2], 0.72), (middle[2], maps - 0.25), BLUE)
    axes.text(middle[1], 0.66, "handed on: $A$, not refined", ha="center", va="bottom", fontsize=9, color=BLUE)
    return figure
