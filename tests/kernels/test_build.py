"""Building the kernels: once, never half, again when stale or damaged; and without a compiler.

A stand-in compiler answers at once and keeps a log, so that compilations can be counted.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_offload.errors import UserError
from moe_offload.kernels import build as build_module
from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.kernels.library import default_threads, require_threads

CPP = Path("src/moe_offload/kernels/cpp")
SOURCE = Path(build_module.__file__).parents[2]

# Logs each call; "compiles" by writing its own arguments to what follows -o.
STAND_IN = """#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in {version}"; exit 0; fi
echo "$@" >> {log}
case "$*" in *-fsyntax-only*) exit {probe};; esac
sleep 0.05
{failure}
while [ "$1" != -o ]; do shift; done
echo whole > "$2"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the build reads, with its own build folder."""
    shutil.copytree(SOURCE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").touch()
    use_compiler(tmp_path, monkeypatch)
    return tmp_path


def use_compiler(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str = "1.0",
    failure: str = "",
    probe: int = 0,
) -> None:
    compiler = folder / "stand-in"
    log = folder / "log"
    compiler.write_text(STAND_IN.format(version=version, log=log, failure=failure, probe=probe))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return start(folder).wait_done()


class start:  # noqa: N801 - reads as a verb
    """One process that builds."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "moe_offload.kernels.build"]
        self.process = subprocess.Popen(
            command, cwd=folder / "src", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_done(self) -> subprocess.CompletedProcess[str]:
        out, err = self.process.communicate(timeout=60)
        return subprocess.CompletedProcess([], self.process.returncode, out, err)


def compilations(folder: Path) -> int:
    return (folder / "log").read_text().count(" -c ") if (folder / "log").exists() else 0


def n_units(folder: Path) -> int:
    return len(list((folder / CPP).glob("*.cpp")))


def test_builds_once_and_again_when_a_source_or_the_compiler_changes(checkout, monkeypatch):
    first = build(checkout)
    assert first.returncode == 0 and first.stderr.count("\n") == 1
    assert "compiling the CPU kernels with stand-in 1.0" in first.stderr
    library = Path(first.stdout.strip())
    assert library.parent == checkout / "build" and library.read_text() == "whole\n"
    units = n_units(checkout)
    assert compilations(checkout) == units

    again = build(checkout)
    assert again.stdout == first.stdout and again.stderr == ""
    assert compilations(checkout) == units

    header = checkout / CPP / "kernels.h"
    header.write_text(header.read_text() + "// changed\n")
    changed = build(checkout)
    assert changed.stdout != first.stdout and compilations(checkout) == 2 * units
    assert not library.exists()  # stale builds do not pile up

    use_compiler(checkout, monkeypatch, version="2.0")
    assert build(checkout).stdout != changed.stdout
    assert compilations(checkout) == 3 * units


def test_processes_that_start_together_compile_once(checkout):
    together = [start(checkout) for _ in range(4)]
    done = [process.wait_done() for process in together]
    assert {process.returncode for process in done} == {0}
    assert len({process.stdout for process in done}) == 1
    assert compilations(checkout) == n_units(checkout)


def test_a_failing_compiler_is_told_in_a_sentence_and_leaves_nothing(checkout, monkeypatch):
    use_compiler(checkout, monkeypatch, failure="echo 'x.cpp:1: error: no such luck' >&2; exit 1")
    failed = build(checkout)
    assert failed.returncode == 2 and "no such luck" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((checkout / "build").glob("*.so"))


@pytest.mark.parametrize("damage", [b"", bytes(5), b"whole\n" + bytes(4096), b"another's"])
def test_a_damaged_library_is_compiled_again(checkout, damage):
    library = Path(build(checkout).stdout.strip())
    library.write_bytes(damage)  # half written, zeros after a power cut, another's file
    again = build(checkout)
    assert again.returncode == 0 and "(again: the file is damaged)" in again.stderr
    assert library.read_text() == "whole\n"
    assert build(checkout).stderr == ""


def test_a_library_without_its_checksum_is_compiled_again(checkout):
    library = Path(build(checkout).stdout.strip())
    checksum = library.with_suffix(".sha256")
    for damaged in ("", "0" * 64, "\xff"):
        checksum.write_text(damaged, "latin-1")
        assert build(checkout).returncode == 0
    checksum.unlink()
    assert build(checkout).returncode == 0
    assert compilations(checkout) == 5 * n_units(checkout)
    assert build(checkout).stderr == ""


def test_without_a_compiler_a_damaged_build_does_not_serve(checkout, monkeypatch):
    library = Path(build(checkout).stdout.strip())
    library.write_bytes(library.read_bytes()[:3])
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = build(checkout)
    assert refused.returncode == 2 and "install g++" in refused.stderr


def test_what_a_killed_build_left_is_removed(checkout):
    folder = checkout / "build"
    (folder / "cpu_experts-build-x1").mkdir(parents=True)
    (folder / "cpu_experts-build-x1" / "layer.o").touch()
    (folder / ".cpu_experts-1-2.so.99.tmp").touch()
    (folder / "demo").mkdir()
    assert build(checkout).returncode == 0
    left = {path.name for path in folder.iterdir()}
    assert left - {"demo", "cpu_experts.lock"} == {
        path.name for path in folder.glob("cpu_experts-*-*") if path.suffix in (".so", ".sha256")
    }
    assert "demo" in left


@pytest.mark.parametrize("setting", ["g++ 'half", "/", "{folder}/not-executable"])
def test_a_compiler_that_cannot_be_one_is_told_in_a_sentence(checkout, monkeypatch, setting):
    (checkout / "not-executable").write_text("neither a script nor a program")
    (checkout / "not-executable").chmod(0o755)
    monkeypatch.setenv("CXX", setting.format(folder=checkout))
    refused = build(checkout)
    assert refused.returncode == 2 and refused.stderr.startswith("error: expected ")
    assert "Traceback" not in refused.stderr


def test_a_compiler_may_speak_in_any_bytes(checkout, monkeypatch):
    words = r"printf 'x.cpp: error: \377\376 so\n' >&2; exit 1"
    use_compiler(checkout, monkeypatch, failure=words)
    failed = build(checkout)
    assert failed.returncode == 2 and " so" in failed.stderr and "Traceback" not in failed.stderr


def in_this_process(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`built_library` here builds as the checkout would."""
    monkeypatch.setattr(build_module, "_build_folder", lambda: checkout)


def test_a_compiler_that_hangs_is_ended_and_told(checkout, monkeypatch):
    """With all that it started: the sentence does not wait for the sleepers."""
    hang = f"sh -c 'echo $$ >> {checkout}/sleepers; exec sleep 600' & wait"
    use_compiler(checkout, monkeypatch, failure=hang)
    in_this_process(checkout, monkeypatch)
    monkeypatch.setattr(build_module, "_UNIT_LIMIT_S", 1.0)
    with pytest.raises(UserError, match="end within 1 s"):
        build_module.built_library()
    sleepers = [int(pid) for pid in (checkout / "sleepers").read_text().split()]
    deadline = time.monotonic() + 30  # they are killed, but a busy machine may take a while
    while any(map(is_alive, sleepers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sleepers and not any(map(is_alive, sleepers))
    assert not list(checkout.glob("cpu_experts-*"))


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stuck_builder_is_told(checkout, monkeypatch):
    in_this_process(checkout, monkeypatch)
    monkeypatch.setattr(build_module, "_LOCK_LIMIT_S", 0.2)
    with (checkout / "cpu_experts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process has held .*cpu_experts\.lock"):
            build_module.built_library()
    assert build_module.built_library().read_text() == "whole\n"


def test_instruction_sets_that_the_compiler_refuses_are_left_out(checkout, monkeypatch):
    use_compiler(checkout, monkeypatch, probe=1)
    assert build(checkout).returncode == 0
    log = (checkout / "log").read_text()
    assert "kernels_scalar.cpp" in log and "-c" in log
    assert "kernels_avx" not in "".join(line for line in log.splitlines() if " -c " in line)
    assert "-DCPUX" not in log


def test_without_a_compiler_an_earlier_build_serves_else_a_sentence(checkout, monkeypatch):
    built = build(checkout).stdout
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build(checkout).stdout == built
    Path(built.strip()).unlink()
    refused = build(checkout)
    assert refused.returncode == 2 and "install g++" in refused.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_checkout_builds_in_the_users_cache(checkout):
    (checkout / "build").mkdir(mode=0o555)
    assert os.environ["XDG_CACHE_HOME"] in build(checkout).stdout


def test_no_compiler_means_torch_with_one_line_or_a_refusal(monkeypatch, capfd):
    def refuse(sanitize: bool) -> Path:
        raise UserError("expected a compiler, found none: install g++")

    monkeypatch.setattr(build_module, "built_library", refuse)
    load_kernels.cache_clear()
    try:
        assert load_kernels() is None
        assert load_kernels() is None
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and "torch" in lines[0] and "install g++" in lines[0]
        with pytest.raises(UserError, match="install g"):
            load_kernels("native")
        with pytest.raises(UserError, match="install g"):
            load_kernels(isa="avx2")
    finally:
        load_kernels.cache_clear()


def test_a_library_that_does_not_load_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(build_module, "built_library", lambda sanitize: broken)
    load_kernels.cache_clear()
    try:
        with pytest.raises(UserError, match="broken"):
            load_kernels("native")
    finally:
        load_kernels.cache_clear()


def test_more_threads_than_any_machine_has_are_refused(monkeypatch):
    """GCC's runtime ends the process by a signal; nothing may start that many first."""
    for number in ("99999", "1025", "9" * 30):
        monkeypatch.setenv("OMP_NUM_THREADS", number)
        with pytest.raises(UserError, match="OMP_NUM_THREADS to be at most 1024"):
            default_threads()
    with pytest.raises(ValueError, match="number of threads"):
        native(threads=99999).fma_gflops(0.001)
    with pytest.raises(UserError, match="--cpu-affinity"):
        native(threads=1).pin(range(99999))


def test_a_limit_on_threads_is_a_sentence(monkeypatch):
    """GCC's runtime would end the process; those that did start are not left behind."""
    start, left = threading.Thread.start, iter(range(3))

    def limited(thread):
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(UserError, match="another thread: raise the limit"):
        require_threads(5)
    assert threading.active_count() == before


def native(threads: int) -> CpuKernels:
    with pytest.MonkeyPatch().context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        kernels = load_kernels("native")
    assert kernels is not None
    return dataclasses.replace(kernels, threads=threads)


def test_threads_are_the_users_or_the_physical_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    default = default_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == default
    assert 1 <= default <= len(os.sched_getaffinity(0))


def test_threads_stay_on_the_cpus_they_are_given():
    usable = sorted(os.sched_getaffinity(0))
    script = (
        "import os, threading, torch\n"
        "from moe_offload.kernels.bindings import load_kernels\n"
        "from moe_offload.errors import UserError\n"
        f"kernels = load_kernels('native', affinity=({usable[0]},))\n"
        "assert kernels.threads == 1, kernels\n"
        f"assert os.sched_getaffinity(0) == {{{usable[0]}}}\n"
        "try:\n"
        "    load_kernels('native', affinity=(5000,))\n"
        "except UserError as error:\n"
        "    assert '5000' in str(error)\n"
        "else:\n"
        "    raise AssertionError('accepted')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SOURCE, timeout=60)


def test_one_openmp_pool_serves_torch_and_the_kernels():
    """Two runtimes would spin against each other: the library's calls go to torch's.

    In a process of its own: other packages bring private runtimes, which nothing here calls.
    """
    script = (
        "from pathlib import Path\n"
        "from moe_offload.kernels.bindings import load_kernels\n"
        "load_kernels('native').fma_gflops(0.001)\n"
        "lines = Path('/proc/self/maps').read_text().splitlines()\n"
        "names = {line.split()[-1] for line in lines if 'gomp' in line or 'iomp' in line}\n"
        "assert len(names) == 1, names\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SOURCE, timeout=60)
