"""One command for a CUDA machine that needs no download: is it right there, and how fast.

    PYTHONPATH=src python3 benchmarks/gpu_check.py --json gpu.json

A fresh machine needs torch with CUDA, transformers, psutil, pyyaml, numpy, pytest and g++. Nothing
is built or downloaded before; the CPU kernels are compiled at the first use.

Runs the CUDA-marked tests, in several processes, then builds models of Mixtral's (bf16, int4),
Qwen3-30B's (int4, fp8), gpt-oss-20b's (mxfp4) and Phi-3.5-MoE's (bf16) shapes with random weights
in memory and measures decoding with each way to serve a miss and, with four of them, prompts of 512
and 4,096 tokens as far as time allows. The time kept for them at the end is for loading and pinning
as many experts as memory holds, and for the expert kernels alone. `--parts` and `--settings` choose
of all that. Two settings, or two versions, are compared in three minutes by

    gpu_check.py --parts models --shapes mixtral-8x7b --settings "cpu only" paper "paper, quota 4" \
        --minutes 2.5 --limit-s 190

Caches are sized for a 24 GB card unless `--memory-gb` says otherwise. Beside the paper's cache
stand the same with hits launched between graphs instead of by one, without any CUDA graphs, with
the CPU's misses after the hits instead of beside them ("serial"), and with the experts of prompts
launched one by one.

The models have all their layers, so that speeds are the real model's, but host memory holds the
experts of some only, at most 16 GB, which the other layers use again in turn: a machine of 32 GB
will do, and less has to be filled and pinned. A step reads and copies as many bytes as it would,
and comes back to a layer's memory only after reading all that is stored. Less is made where memory
is short, or the machine too slow to fill it in a third of the time there is.

It is over after eight minutes, whatever happens: the measuring is done by another process. No
setting starts after `--minutes`, and each takes its share of the time that is left, of which the
first models have more; all but a model's first three give way where it has had its own. At
`--limit-s` that process is ended with all it started, hanging or not. The report is written anew
after each setting, so that what was measured is kept, and what was not is named, however it ends.
Where the process dies of a setting, or its GPU can no longer be used, another goes on behind it.

Routing is synthetic with Mixtral's reuse of experts (or `--trace`), the same for every setting.
Prefetching guesses with the model's own routers, which know nothing of such routing: it is measured
with the model's own routing instead, beside the same cache without prefetching ("model routing";
on random weights the recall says little about a trained model's).

Correct means two things. Layers of decode steps agree with the plain torch oracle on the CPU, given
the same input and routing. And, where routing is fixed, the logits of a prompt and some steps are
those of the CPU computing every expert. (With the model's routing a near tie may fall either way.)

What speeds are to be held against is measured first: the card's own copies, within its memory and
over the link. "hits" are the bytes of one-token experts in that time, "between" is the host's time
from the end of one layer's experts to the next one's call, "slowed" what hits take in layers that
start copies, over those that start none.

"% of bound" is the least time that this machine's measured speeds allow for the routing, as a share
of the time taken: experts that were in the cache cost the GPU's time; all others, waited for or
fetched ahead included, are shared by CPU and bus in the best way, everything overlapped.

Exit code: 0 when the tests passed and every setting was measured and right, 1 when not, 2 without a
GPU. Without one, `--device cpu --shapes mixtral-8x7b --layers 2` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import psutil
import yaml

from moe_offload.files import write_atomically
from moe_offload.simulation.shapes import SHAPES_FILE

ROOT: Final = Path(__file__).resolve().parent.parent
Format = Literal["bf16", "int8", "int4", "mxfp4", "fp8"]

# The most telling first: what is not reached in time is the least.
MODELS: tuple[tuple[str, Format], ...] = (
    ("mixtral-8x7b", "bf16"),
    ("qwen3-30b-a3b", "int4"),
    ("gpt-oss-20b", "mxfp4"),
    ("qwen3-30b-a3b", "fp8"),
    ("mixtral-8x7b", "int4"),
    ("phi-3.5-moe", "bf16"),
)
SHARES: Final = (4, 3, 1, 1, 1, 1)  # of the time, by their order
PARTS: Final = ("tests", "models", "memory", "kernels")
KEPT_S: Final = {"memory": 50.0, "kernels": 40.0}  # of the time, for what comes after the models
SETTINGS: Final = (
    *("cpu only", "paper", "paper, hits launched", "paper, serial", "--cache-auto"),
    *("fetch on demand", "next-layer prefetch", "paper, no graphs", "paper, quota 4"),
    *("paper, one by one", "fetch, cached", "paper, auto misses", "fetch on demand, cached"),
)
MEASURING = ("-m", "benchmarks.gpu_measurements")  # what Python runs
RUNNING: Final = "running"
COMPLETE: Final = "complete"
LOST: Final = 3  # exit code of a process whose GPU can no longer be used
_AT_THE_LIMIT: Final = "ended at the time limit"
_INTERRUPTED: Final = "interrupted"
_LEAST_S: Final = 30.0  # with less left, no process goes on behind one that died
_KILL_WAIT_S: Final = 8.0  # a driver takes a while to unpin what a process leaves behind


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = sorted(yaml.safe_load(SHAPES_FILE.read_text(encoding="utf-8")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=shapes, help="each in all --formats")
    parser.add_argument("--formats", nargs="+", choices=get_args(Format), default=["bf16"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps measured per setting")
    parser.add_argument("--memory-gb", type=float, default=20.0, help="for --cache-auto (20)")
    parser.add_argument("--trace", type=Path, help="routing trace instead of synthetic routing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--pin-gb", type=float, default=90.0, help="of memory at most (90)")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="start no setting after this (7)"
    )
    parser.add_argument("--limit-s", type=float, default=470.0, help="end all after this (470)")
    parser.add_argument("--json", type=Path, help="where to keep the report")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def models(arguments: argparse.Namespace) -> list[tuple[str, Format]]:
    """What to measure, in this order: `--shapes`, else `MODELS`."""
    if arguments.shapes is None:
        return list(MODELS)
    return [(shape, fmt) for shape in arguments.shapes for fmt in arguments.formats]


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Replace the report: whoever reads it, at any time, finds a whole one."""
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def run_limited(command: Sequence[str], limit_s: float) -> tuple[int, str | None]:
    """Run `command` and end it, with all it started, after `limit_s`.

    Returns its exit code, and how it ended where that was not of its own accord.
    """
    child = subprocess.Popen(
        command,
        start_new_session=True,  # a process group: its own children are ended with it
        env={**os.environ, "PYTHONPATH": _python_path()},
    )
    try:
        code = child.wait(max(0.0, limit_s))
        return (code, None) if code >= 0 else (1, f"killed by signal {-code}")
    except subprocess.TimeoutExpired:
        return 1, _AT_THE_LIMIT
    except KeyboardInterrupt:
        return 1, _INTERRUPTED
    finally:
        _end_group(child)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])


def _end_group(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody is left
    try:
        child.wait(_KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        print(f"process {child.pid} is not gone yet; the driver may take longer", file=sys.stderr)


def finish(report: Path, ended: str | None) -> bool:
    """Say in the report how the measuring ended, if not of its own accord; False then."""
    document = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    if ended is None and document.get("ended") in (None, RUNNING):
        ended = "ended before it was done"
    if ended is not None:
        missing = document.setdefault("skipped", [])
        document.setdefault("rows", [])
        document["ended"] = ended
        write_report(report, document)
        print(f"{ended}; not measured: " + ("; ".join(missing) or "nothing"), flush=True)
    return ended is None


def main(argv: Sequence[str] | None = None, started_s: float | None = None) -> int:
    """Measure in another process and end it in time. `started_s`: since when, in Unix time."""
    argv = sys.argv[1:] if argv is None else list(argv)
    started_s = time.time() if started_s is None else started_s
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = arguments.json or Path(folder) / "report.json"
        report.unlink(missing_ok=True)  # an earlier run's is not this one's
        command = [sys.executable, *MEASURING, *argv, "--json", str(report)]
        end_s = started_s + arguments.limit_s
        code, ended = run_limited(command, end_s - time.time())
        while died_of_a_setting(report, ended) and end_s - time.time() > _LEAST_S:
            left_s = end_s - time.time()
            minutes = arguments.minutes - (arguments.limit_s - left_s) / 60
            more = ["--go-on", "--minutes", str(minutes), "--limit-s", str(left_s)]
            code, ended = run_limited([*command, *more], left_s)
        if code == 2 and ended is None:  # a mistake in the command, or no GPU
            return code
        return code if finish(report, ended) else 1


def died_of_a_setting(report: Path, ended: str | None) -> bool:
    """Whether the measuring stopped in the middle of a setting, which the report then gives up."""
    if ended in (_AT_THE_LIMIT, _INTERRUPTED) or not report.exists():
        return False
    document = json.loads(report.read_text(encoding="utf-8"))
    at = document.pop("at", None)
    if document.get("ended") != RUNNING or at is None:
        return False
    given_up = document.setdefault("given_up", [])
    if at not in [one[:3] for one in given_up]:
        given_up.append([*at, ended or "the process ended"])
    write_report(report, document)
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(started_s=psutil.Process().create_time()))
