"""How every figure of the project looks and is saved: PNG, PDF, and its numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from moe_offload.errors import UserError

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
RED, PURPLE, GREEN, GREY = "#D55E00", "#CC79A7", "#009E73", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY)
LINE_STYLES = ("-", "--", "-.", ":")
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
    "svg.hashsalt": "figures",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Inside, figures are drawn in the project's style."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def save_figure(
    figure: Figure,
    folder: Path,
    name: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
) -> list[Path]:
    """Write NAME.png, NAME.pdf and the drawn numbers as NAME.csv; returns the three paths.

    Raises UserError where `folder` cannot be written.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(paths[0])
            figure.savefig(paths[1], metadata={"CreationDate": None})
        with paths[2].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([_cell(value) for value in row] for row in rows)
    except OSError as error:
        raise UserError(
            f"expected to write figures to {folder}, but {error.strerror}: choose another folder"
        ) from error
    return paths


def _cell(value: object) -> object:
    """Six digits; empty for what is missing (None, not a number)."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else value
