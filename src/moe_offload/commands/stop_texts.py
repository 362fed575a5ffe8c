"""Where an answer ends: at the first of its stop texts, which may come in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def n_begun(text: str, *marks: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    sizes = range(longest, 0, -1)
    return next((n for n in sizes if any(one.startswith(text[-n:]) for one in marks)), 0)


class UpToStop:
    """A text, piece by piece, up to the first of the `stop` texts, which is not part of it.

    What may be the beginning of one is held back until it is known not to be.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.is_over = False

    def push(self, piece: str) -> str:
        """What is certain now."""
        if self.is_over:
            return ""
        text = self._held + piece
        found = [(place + len(one), place) for one in self._stop if (place := text.find(one)) >= 0]
        self.is_over = bool(found)
        # of several the one that is whole first, however the text was cut into pieces
        end = min(found)[1] if found else len(text) - n_begun(text, *self._stop)
        self._held = "" if self.is_over else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest
