"""Ctrl-C, a polite kill and a closed terminal: each ends a run in order, none tears a report."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread.

    A signal that the process was started to ignore (`nohup`, a shell's background job) stays
    ignored. Entered on another thread, it changes nothing: Python handles signals on the main one.

    Once `drops_signals` is set, a signal does nothing and is forgotten: what is being written is
    written to its end. Setting it is not a call, at whose start a signal could still be answered.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.drops_signals = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that the signal ended: 130, or 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    @property
    def name(self) -> str:
        """How the user knows it: `Ctrl-C`, or the signal's name."""
        if self.signal in (None, signal.SIGINT):
            return "Ctrl-C"
        return str(self.signal.name) if self.signal is not None else ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.drops_signals:
            self.signal = self.signal or signal.Signals(number)
            raise KeyboardInterrupt

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
