"""An answer's text, piece by piece: up to its stop text, and as a person sees it.

Reasoning, the `<think>` parts, is shown dimmed, hidden or as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from moe_offload.model.tokenization import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"
_N_LAST_TOKENS: Final = 16  # in which a chat template may have opened the first part


def _n_begun(text: str, *marks: str) -> int:
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
        end = min(found)[1] if found else len(text) - _n_begun(text, *self._stop)
        self._held = "" if self.is_over else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest


class ThinkingView:
    """Text as it is shown, piece by piece; a tag may be cut in two by its pieces.

    `thinks`: the text begins inside a part, which its prompt has opened.
    """

    def __init__(self, hidden: bool, dimmed: bool, thinks: bool = False) -> None:
        self._hidden = hidden
        self._dimmed = dimmed and not hidden
        self._thinks = thinks
        self._rest = ""  # what may be the beginning of a tag
        self._is_dim = False
        self._begins = True  # nothing was shown since the start

    def push(self, piece: str) -> str:
        """What is to be shown now."""
        if not (self._hidden or self._dimmed):
            return piece
        self._rest += piece
        shown = ""
        while (place := self._rest.find(self._tag)) >= 0:
            tag = self._tag
            if self._thinks:
                shown += self._seen(self._rest[:place] + tag)
                self._thinks = False
            else:
                shown += self._seen(self._rest[:place])
                self._thinks = True
                shown += self._seen(tag)
            self._rest = self._rest[place + len(tag) :]
        end = len(self._rest) - _n_begun(self._rest, self._tag)
        shown += self._seen(self._rest[:end])
        self._rest = self._rest[end:]
        return shown

    def finish(self, piece: str) -> str:
        """What is to be shown with the last piece; the terminal is then as it was before."""
        shown = self.push(piece) + self._seen(self._rest)
        shown += _NORMAL if self._is_dim else ""
        self._rest, self._is_dim = "", False
        return shown

    @property
    def _tag(self) -> str:
        """The one that ends what the text is in."""
        return _CLOSE if self._thinks else _OPEN

    def _seen(self, text: str) -> str:
        if self._hidden:
            text = "" if self._thinks else text
            text = text.lstrip() if self._begins else text  # no empty lines in a part's place
            self._begins = self._begins and not text
            return text
        if text and self._thinks != self._is_dim:
            self._is_dim = self._thinks
            return (_DIM if self._is_dim else _NORMAL) + text
        return text


def view_of(ids: Sequence[int], tokenizer: Tokenizer, hidden: bool) -> ThinkingView:
    """How stdout shows the answer to a prompt of these tokens: dimmed on a terminal alone."""
    dimmed = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    end = tokenizer.decode(ids[-_N_LAST_TOKENS:]) if hidden or dimmed else ""
    return ThinkingView(hidden, dimmed, thinks=end.rstrip().endswith(_OPEN))
