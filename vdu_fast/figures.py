"""What the pictures of reports and comparisons have in common: colours, a figure, axes without clutter, PNG bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any common colour vision tell apart.
BEFORE, AFTER, ORACLE, FLOOR, FORGOTTEN = "#8A94A0", "#0072B2", "#009E73", "#CC79A7", "#D1300F"
INK, FAINT = "#1D2530", "#5C6773"


def new_figure(width: float, height: float, **layout: Any) -> Figure:
    """A figure without pyplot, whose global state would leak between reports. Sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, **layout)
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.12, h_pad=0.06)  # type: ignore[call-arg]
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png", facecolor="white")
    return buffer.getvalue()


def tidy(axes: Axes, grid: str = "y") -> None:
    """No frame above and on the right, faint ticks and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#C4CBD2")
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(axis=grid, color="#E8EBEE", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
