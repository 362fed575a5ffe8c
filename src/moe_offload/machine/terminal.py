"""Everything between a program and the person at the terminal.

Text that is always shown, whatever the terminal can take; signals that end a run in order; and how
far a run has come, on stderr: only on a terminal, and not in the first second.
"""

from __future__ import annotations

import errno
import io
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TextIO

from tqdm import tqdm

from moe_offload.errors import FEW_THREADS, UserError, plain

if TYPE_CHECKING:
    from torch import nn

EXIT_USER_ERROR: Final = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def show(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print to `file`, stdout unless given, at once.

    A character that `file` cannot encode is written as its escape: a terminal in ASCII loses no
    answer. What goes to a terminal that was closed is dropped, from then on: a run that its SIGHUP
    ends has results to write yet, and one that ignores it goes on. OSError for all else that cannot
    be written, such as a pipe without a reader.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    whole = (text + end).encode(encoding, "backslashreplace").decode(encoding)
    try:
        file.write(whole)
        file.flush()
    except OSError as error:
        status = os.fstat(file.fileno())
        was_terminal = stat.S_ISCHR(status.st_mode) and not os.isatty(file.fileno())
        # What could not be written goes nowhere: the flush at exit would fail again, and change the
        # exit code.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
        if error.errno != errno.EIO or not was_terminal:
            error.filename = getattr(file, "name", None)
            raise


def say(text: str, file: TextIO | None = None) -> None:
    """Lines for the user, on stderr; that nobody reads them, such as a closed pipe, is no error."""
    with suppress(OSError):
        show("\n".join(map(plain, text.split("\n"))), file=file or sys.stderr)


def complain(error: object) -> None:
    """The one sentence of an error, on stderr."""
    say("error: " + " ".join(str(error).split()))


def open_closed_streams() -> None:
    """Stands /dev/null in for a standard stream that was closed before the start (`>&-`).

    Else the next file that is opened would take its number, and receive what is printed. Standard
    output shows what it cannot encode as its escape from now on, whoever prints it.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:  # in the order of the numbers that they take, which are the lowest free
        setattr(
            sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w")
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if "stdout" in closed:
        say("standard output is closed: what this program prints is lost")


def answer(work: Callable[[], int], debug: bool) -> int:
    """The exit code of `work`; what ends it early is told in one sentence.

    A mistake that a person can mend gives 2, Ctrl-C what a shell expects. A reader that has seen
    enough, as `| head`, is no mistake; a full disk behind stdout is one.
    """
    open_closed_streams()
    try:
        code = work()
        show("", end="")  # what was printed and not flushed
        return code
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        complain(sentence)
        return EXIT_USER_ERROR
    finally:
        with suppress(OSError):  # of what was printed before an error
            show("", end="")


def _sentence(error: Exception) -> object:
    """What a person can mend; None for a fault of this program."""
    if isinstance(error, (UserError, OSError)):
        return error
    if isinstance(error, MemoryError):
        return "no memory is left: end other programs, or raise the limit that is set"
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":  # Python's words
        return FEW_THREADS
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # before 3.13
        return f"{error}: it leads to itself, remove it"
    return None


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread.

    A signal that the process was started to ignore (`nohup`, a shell's background job) stays
    ignored. Entered on another thread, it changes nothing: Python handles signals on the main one.

    Once `drops_signals` is set, a signal does nothing and is forgotten: what is being written is
    written to its end. Setting it is not a call, at whose start a signal could still be answered.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self.drops_signals = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that the signal ended: 130, or 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    @property
    def name(self) -> str:
        """How the user knows it: `Ctrl-C`, or the signal's name."""
        number = self.signal or signal.SIGINT
        return "Ctrl-C" if number == signal.SIGINT else number.name

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


@contextmanager
def byte_bar(what: str, total_bytes: int, leave: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on stderr, silent when that is no terminal; call what it gives to advance.

    `leave`: the full bar stays on the terminal.
    """
    silent = not sys.stderr.isatty()
    with tqdm(
        total=total_bytes, desc=what, unit="B", unit_scale=True, disable=silent, leave=leave
    ) as bar:

        def advance(n_bytes: int) -> None:
            bar.update(n_bytes)

        yield advance


class RunProgress:
    """A bar over the MoE blocks while prompts are evaluated, then one over prompts or tokens.

    Several prompts are counted as they finish, a single one by its tokens; both show tokens per
    second and the time left. `streamed` says that the terminal shows the text itself: then only
    the evaluation of prompts has a bar. Where there is no terminal, and `logged`, a line every
    `line_every_s` tells the same. Driven by the inference thread.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        n_prompts: int,
        max_tokens: int,
        *,
        streamed: bool,
        logged: bool = False,
        file: TextIO | None = None,
        delay_s: float = 1.0,
        line_every_s: float = 60.0,
    ) -> None:
        self._blocks = blocks
        self._file = sys.stderr if file is None else file
        self._delay_s = delay_s
        self._shown = self._file.isatty()
        self._evaluation: Any = None
        self._hooks: list[Any] = []
        self._n_prompts = n_prompts
        self._by_prompt = n_prompts > 1
        self._n_tokens = self._n_done = 0
        self._started_s = time.perf_counter()
        self._line_every_s = line_every_s if logged and not self._shown else math.inf
        self._next_line_s = self._started_s + self._line_every_s
        counted = (
            ("prompts", "prompt", n_prompts) if self._by_prompt else ("tokens", "tok", max_tokens)
        )
        self._bar = self._new_bar(*counted, shown=self._shown and not streamed)

    def _new_bar(self, what: str, unit: str, total: int, shown: bool) -> Any:
        return tqdm(
            total=total, desc=what, unit=unit, file=self._file, disable=not shown, leave=False,
            delay=self._delay_s,
        )  # fmt: skip

    def evaluate(self, n_prompts: int) -> None:
        """A forward pass over `n_prompts` prompts is about to start."""
        if not self._shown:
            return
        what = "evaluating " + ("the prompt" if n_prompts == 1 else f"{n_prompts} prompts")
        self._evaluation = self._new_bar(what, "layer", len(self._blocks), shown=True)
        self._hooks = [block.register_forward_hook(self._layer_done) for block in self._blocks]

    def _layer_done(self, *_: object) -> None:
        self._evaluation.update()

    def token(self, count: int = 1) -> None:
        """A prompt got a token, or several."""
        self._end_evaluation()
        self._n_tokens += count
        now_s = time.perf_counter()
        rate = self._n_tokens / max(now_s - self._started_s, 1e-9)
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + self._line_every_s
            done = f"{self._n_done} of {self._n_prompts} prompts done"
            say(f"{done}, {self._n_tokens} tokens, {rate:.1f} tok/s", self._file)
        self._bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
        if not self._by_prompt:
            self._bar.update(count)

    def prompt_done(self) -> None:
        """A prompt has all its tokens."""
        self._n_done += 1
        if self._by_prompt:
            self._bar.update()

    def _end_evaluation(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def close(self) -> None:
        """Remove the bars; may be called at any moment."""
        self._end_evaluation()
        self._bar.close()
