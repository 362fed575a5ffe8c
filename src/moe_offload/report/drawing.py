"""How every figure looks, what it is made of, and how it is saved with its numbers."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moe_offload.errors import UserError, plain
from moe_offload.files import write_together
from moe_offload.report.read_back import Floats

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
RED, PURPLE, GREEN, GREY = "#D55E00", "#CC79A7", "#009E73", "#7F7F7F"
_CYCLE = list(zip("osD^v<>P", (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY), strict=True))
HEAT_MAP = "cividis"

_STYLE: dict[str, object] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text in papers
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",  # the same figure is the same file
    "text.parse_math": False,  # a folder may have dollars in its name
}
# Dates would make two files of one figure differ.
_METADATA = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name without suffix, and the numbers in it as a table."""

    name: str
    figure: Figure = field(repr=False)
    header: tuple[str, ...]
    rows: Rows = field(repr=False)


@contextmanager
def house_style() -> Iterator[None]:
    """Inside, figures are drawn in the project's style."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def save_drawing(drawing: Drawing, folder: Path, prefix: str = "") -> list[Path]:
    """Write the figure as PNG, PDF and SVG, and its numbers as CSV; returns the paths.

    Raises UserError where they cannot be written; then none is.
    """
    contents: dict[str, bytes | str] = {}
    with house_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font has not
        for suffix, metadata in _METADATA.items():
            image = io.BytesIO()
            drawing.figure.savefig(image, format=suffix, metadata=metadata)
            contents[suffix] = image.getvalue()
            drawing.figure.set_layout_engine("none")  # laid out once, which is most of the work
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(drawing.header)
    writer.writerows(map(_cell, row) for row in drawing.rows)
    contents["csv"] = table.getvalue()
    of_path = {folder / f"{prefix}{drawing.name}.{end}": [one] for end, one in contents.items()}
    try:
        write_together(of_path)
    except OSError as error:
        raise UserError(
            f"expected to write figures to {folder}, but found at {error.filename}: "
            f"{error.strerror}: choose another folder"
        ) from error
    return list(of_path)


def _cell(value: object) -> object:
    """Six digits; empty for what is not a number."""
    if isinstance(value, float):
        return f"{value:.6g}" if value == value else ""
    return value


def new_figure(width: float, height: float, *subjects: str) -> Figure:
    """A figure, in inches, that says over its panels what was measured."""
    figure = Figure(figsize=(width, height))
    wrapped = fill(plain(joined(*subjects))[:400], int(16 * width))
    figure.suptitle(wrapped, x=0.01, ha="left", size=8, color=GREY)
    return figure


def joined(*facts: str) -> str:
    """The facts that are known."""
    return ", ".join(filter(None, facts))


def top_of(values: npt.ArrayLike, room: float) -> float:
    """Where an axis from 0 ends: `room` times the highest value, NaN left out."""
    return room * float(np.nanmax(values, initial=0.0)) or 1.0


def whole_numbers(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def line_style(number: int) -> dict[str, Any]:
    """Marker and colour of the line with this number."""
    marker, colour = _CYCLE[number % len(_CYCLE)]
    return {"marker": marker, "color": colour}


def heat_map(axes: Axes, values: Floats, label: str, **options: Any) -> None:
    image = axes.imshow(values, aspect="auto", cmap=HEAT_MAP, origin="lower", **options)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=label)


def bars(axes: Axes, names: Sequence[str], parts: Floats, colours: Iterable[str]) -> None:
    """A bar for each name, downwards; `parts` [parts, bars] lie end to end in it."""
    places, left = np.arange(parts.shape[1]), np.zeros(parts.shape[1])
    for lengths, colour in zip(parts, colours, strict=True):
        axes.barh(places, lengths, left=left, color=colour, height=0.6)
        left += lengths
    axes.set_yticks(places[: len(names)], names)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.grid(False, axis="y")


def name_colours(figure: Figure, colours: dict[str, str], shown: Floats, n_columns: int) -> None:
    """A legend of the colours that the figure shows: `shown` [rows, colours] is not all 0 there."""
    handles = [
        Patch(color=colour, label=name.replace("_", " "))
        for (name, colour), values in zip(colours.items(), shown.T, strict=True)
        if values.any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)
