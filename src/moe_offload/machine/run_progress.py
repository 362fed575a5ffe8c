"""How far a run has come, on stderr: only on a terminal, and not in the first second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any, TextIO

from torch import nn
from tqdm import tqdm


@contextmanager
def told_if_slow(line: str, *, file: TextIO | None = None, delay_s: float = 1.0) -> Iterator[None]:
    """Show `line` once what is done inside has taken `delay_s`, where `file` is a terminal."""
    where = sys.stderr if file is None else file

    def tell() -> None:
        with suppress(OSError):  # a closed terminal
            print(line, file=where, flush=True)

    timer = Timer(delay_s, tell)
    timer.daemon = True
    if where.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def byte_bar(what: str, total_bytes: int, leave: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on stderr, silent when that is no terminal; call what it gives to advance.

    `leave`: the full bar stays on the terminal.
    """
    with tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=leave,
    ) as bar:

        def advance(n_bytes: int) -> None:
            bar.update(n_bytes)

        yield advance


class RunProgress:
    """A bar over the MoE blocks while prompts are evaluated, then one over prompts or tokens.

    Several prompts are counted as they finish, a single one by its tokens; both show tokens per
    second and the time left. `streamed` says that the terminal shows the text itself: then only
    the evaluation of prompts has a bar. Driven by the inference thread.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        n_prompts: int,
        max_tokens: int,
        *,
        streamed: bool,
        file: TextIO | None = None,
        delay_s: float = 1.0,
    ) -> None:
        self._blocks = blocks
        self._file = sys.stderr if file is None else file
        self._delay_s = delay_s
        self._shown = self._file.isatty()
        self._evaluation: Any = None
        self._hooks: list[Any] = []
        self._by_prompt = n_prompts > 1
        self._n_tokens = 0
        self._started_s = time.perf_counter()
        what = (
            ("prompts", "prompt", n_prompts) if self._by_prompt else ("tokens", "tok", max_tokens)
        )
        self._bar: Any = self._new_bar(*what, disable=streamed or not self._shown)

    def _new_bar(self, what: str, unit: str, total: int, disable: bool) -> Any:
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            file=self._file,
            disable=disable,
            leave=False,
            delay=self._delay_s,
        )

    def evaluate(self, n_prompts: int) -> None:
        """A forward pass over `n_prompts` prompts is about to start."""
        if not self._shown:
            return
        what = "evaluating " + ("the prompt" if n_prompts == 1 else f"{n_prompts} prompts")
        self._evaluation = self._new_bar(what, "layer", len(self._blocks), disable=False)
        self._hooks = [block.register_forward_hook(self._layer_done) for block in self._blocks]

    def _layer_done(self, *_: object) -> None:
        self._evaluation.update()

    def token(self) -> None:
        """A prompt got a token."""
        self._end_evaluation()
        self._n_tokens += 1
        if self._bar.disable:
            return
        rate = self._n_tokens / max(time.perf_counter() - self._started_s, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
        if not self._by_prompt:
            self._bar.update()

    def prompt_done(self) -> None:
        """A prompt has all its tokens."""
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
