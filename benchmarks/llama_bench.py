"""llama-bench, llama.cpp's or ik_llama.cpp's, as a peer of `side_by_side.py`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, NamedTuple

from moe_offload.errors import UserError

DECODED: Final = 64


class Work(NamedTuple):
    """What one row measures: a prompt of so many tokens, `DECODED` tokens after as many, or as many
    through the experts of one layer alone."""

    kind: Literal["prompt", "decode", "experts"]
    prompt: int

    def __str__(self) -> str:
        if self.kind == "decode":
            return f"{DECODED} after {self.prompt}"
        return f"{self.kind} of {self.prompt}"

    @property
    def tokens(self) -> int:
        return DECODED if self.kind == "decode" else self.prompt


Seconds = dict[Work, float]  # medians of the repetitions


@dataclass(frozen=True)
class Peer:
    """A llama-bench; `is_ik`: ik_llama.cpp's, which has other flags."""

    path: Path
    is_ik: bool

    @property
    def name(self) -> str:
        return "ik_llama.cpp" if self.is_ik else "llama.cpp"

    def commands(
        self, model: Path, works: Sequence[Work], threads: int, repetitions: int
    ) -> list[list[str]]:
        """Command lines that measure `works` and print JSON, each loading the model once.

        Both repack quantised weights for their kernels: ik_llama.cpp by `-rtr`, llama.cpp unasked.
        """
        common = [str(self.path), "-m", str(model), "-t", str(threads), "-r", str(repetitions)]
        common += ["-o", "json", "-fa", "1", *(("-fmoe", "1", "-rtr", "1") if self.is_ik else ())]
        prompts = [str(work.prompt) for work in works if work.kind == "prompt"]
        contexts = [str(work.prompt) for work in works if work.kind == "decode"]
        evaluating = [*common, "-n", "0", "-p", ",".join(prompts or ["0"])]
        if self.is_ik:
            decoding = [part for one in contexts for part in ("-gp", f"{one},{DECODED}")]
            return [[*evaluating, *decoding]]
        decoding = [*common, "-p", "0", "-n", str(DECODED), "-d", ",".join(contexts)]
        return [evaluating] * bool(prompts) + [decoding] * bool(contexts)


def find_peer(path: Path) -> Peer:
    """UserError where `path` is no llama-bench that runs."""
    try:
        said = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"expected --peer {path} to be a llama-bench, but {error}") from None
    flags = said.stdout + said.stderr
    if "--n-prompt" not in flags:
        raise UserError(
            f"expected --peer {path} to be a llama-bench, but its --help names no --n-prompt: "
            "give the path of llama.cpp's or ik_llama.cpp's program of that name"
        )
    return Peer(path, is_ik="--fused-moe" in flags)


def parse_seconds(text: str, works: Iterable[Work]) -> Seconds:
    """What each of `works` took, by llama-bench's JSON; UserError where one is missing."""
    try:
        tests = json.loads(text[text.index("[") :])
        speeds = {_work_of(test): median(map(float, test["samples_ts"])) for test in tests}
        return {work: work.tokens / speeds[work] for work in works}
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"expected llama-bench to print its tests as JSON, found {text[:80]!r} ({error!r}): "
            "use another release of it"
        ) from None


def _work_of(test: dict[str, Any]) -> Work:
    """ik_llama.cpp counts what comes before the decoded tokens as prompt, llama.cpp as depth."""
    kind: Any = "decode" if test["n_gen"] > 0 else "prompt"
    return Work(kind, test["n_prompt"] + test.get("n_depth", 0))


def measure_peer(
    peer: Peer, model: Path, works: Sequence[Work], threads: int, repetitions: int
) -> Seconds:
    """What each of `works` took with the GGUF file `model`; UserError where the peer fails."""
    printed = []
    for command in peer.commands(model, works, threads, repetitions):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{peer.path} ended with {done.returncode} on {model}: {last}")
        printed.append(done.stdout[done.stdout.find("[") :].strip().strip("[]"))
    return parse_seconds(f"[{','.join(printed)}]", works)
