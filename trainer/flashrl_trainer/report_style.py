"""How every plot of a report looks. Knows nothing of what is plotted."""

from typing import Literal

from matplotlib.axes import Axes

# Okabe and Ito's palette without yellow: told apart by the colour-blind, and on white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#333333", "#dddddd"


def plain_axes(axis: Axes, title: str, grid: Literal["x", "y"]) -> None:
    """A title on the left, faint lines across, and no frame."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.grid(axis=grid, color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
