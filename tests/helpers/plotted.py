"""Whether a figure file shows something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import image


def is_drawn(path: Path) -> bool:
    """A PNG of sensible size with more than a handful of colours on its white ground."""
    if path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    pixels = np.asarray(image.imread(path))
    colours = np.unique(pixels.reshape(-1, pixels.shape[-1]).round(2), axis=0)
    ink = (pixels[..., :3].min(axis=2) < 0.9).mean()
    return min(pixels.shape[:2]) > 150 and len(colours) > 8 and 0.005 < float(ink) < 0.95
