"""Compiles the CPU kernels: one shared library with every instruction set, chosen at run time.

The library's name carries a digest of its sources and flags and one of the compiler, so a stale
build is never loaded. A build is made in a folder of its own under a file lock, and is renamed when
whole and on the disk, with its checksum beside it: processes that start together compile once and
never load half a file, and a file that was damaged later is compiled again. A compiler or another
builder that hangs ends in a sentence after minutes.

`python -m moe_offload.kernels.build` builds ahead of the first use; `--sanitize` adds
AddressSanitizer and UndefinedBehaviorSanitizer, for a process that has their runtime preloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moe_offload.errors import UserError
from moe_offload.files import user_cache, write_together

SOURCES: Final = Path(__file__).resolve().parent / "cpp"

_COMMON: Final = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"),
    # Tables and bit patterns cross element types; no code reads errno or floating-point traps.
    *("-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"),
    # Only the kernels' own multiply-adds fuse: activations and levels are equal on every machine.
    "-ffp-contract=off",
    # GCC warns inside its own intrinsics (bug 105593).
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_OPTIMISED: Final = ("-O3",)
_SANITIZED: Final = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)

_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512: Final = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# Source of one instruction set -> its flags. Each is left out where the compiler refuses them.
_X86_VARIANTS: Final = {
    "kernels_avx2": _AVX2,
    "kernels_avx_vnni": (*_AVX2, "-mavxvnni"),
    "kernels_avx512": _AVX512,
    "kernels_avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "kernels_avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}


# One unit takes seconds. Longer than this is a compiler, or another builder, that hangs.
_PROBE_LIMIT_S: Final = 60.0
_UNIT_LIMIT_S: Final = 600.0
_LOCK_LIMIT_S: Final = 900.0

_NAME: Final = "cpu_experts"


@dataclass
class _Compiler:
    command: tuple[str, ...]
    version: str = ""
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _is_ending: bool = False

    def run(self, *arguments: str, limit_s: float = _PROBE_LIMIT_S) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; UserError where it does not start or does not end."""
        command = [*self.command, *arguments]
        try:
            # A session of its own: what the compiler starts ends with it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"expected to run the compiler {command[0]}, but {error}") from None
        self._running.add(process)
        if self._is_ending:
            _end(process)
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"expected `{shlex.join(command)}` to end within {limit_s:.0f} s, and it did not: "
                "set CXX to another compiler"
            ) from None
        finally:
            _end(process)
            self._running.discard(process)
        return process.returncode, out, err

    def end_all(self) -> None:
        """End what other threads run, or start from now on."""
        self._is_ending = True
        for process in list(self._running):
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def built_library(sanitize: bool = False) -> Path:
    """The path of the up-to-date shared library, compiled first where it is missing or stale.

    Says so in one line on stderr. UserError when there is no compiler and no earlier build, or
    when the compiler fails.
    """
    flags = (*_COMMON, *(_SANITIZED if sanitize else _OPTIMISED))
    folder = _build_folder()
    stem = f"{_NAME}{'_sanitized' if sanitize else ''}-{_source_digest(flags)}"
    compiler = _find_compiler()
    if compiler is None:
        for earlier in sorted(folder.glob(f"{stem}-*.so")):
            if _is_whole(earlier):
                return earlier
        raise UserError(
            "expected a C++17 compiler for the CPU kernels, found neither $CXX nor g++, clang++ or "
            "c++ on PATH: install g++ (Debian, Ubuntu: apt install g++)"
        )
    library = folder / f"{stem}-{_digest(compiler.version)}.so"
    if _is_whole(library):
        return library
    try:
        with _locked(folder):
            if not _is_whole(library):  # another process may have built it meanwhile
                _clear_leftovers(folder)
                why = "again: the file is damaged" if library.exists() else "once"
                print(f"compiling the CPU kernels with {compiler.version} ({why})", file=sys.stderr)
                _compile(compiler, flags, library)
                for old in folder.glob(f"{stem.partition('-')[0]}-*.so"):
                    if old != library:
                        old.unlink(missing_ok=True)
                        _checksum_file(old).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"expected to write the compiled kernels {library}, but {error}") from None
    return library


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Whether the file is what was compiled: a damaged one would end the process by a signal."""
    try:
        found = hashlib.sha256(library.read_bytes()).hexdigest()
        return _checksum_file(library).read_text("ascii") == found
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, waited for as long as another process may take to compile."""
    path = folder / f"{_NAME}.lock"
    deadline = time.monotonic() + _LOCK_LIMIT_S
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has held {path} for {_LOCK_LIMIT_S:.0f} s while it "
                        "compiles the CPU kernels: end it, then start again"
                    ) from None
                time.sleep(0.05)
        yield


def _clear_leftovers(folder: Path) -> None:
    """Remove what builds that were killed left behind; only the lock's holder builds."""
    for leftover in (*folder.glob(f"{_NAME}-build-*"), *folder.glob(f".{_NAME}*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _build_folder() -> Path:
    """`build/` of the checkout; the user's cache where there is none or it cannot be written."""
    source, checkout = SOURCES.parents[2:4]
    if source.name == "src" and (checkout / "pyproject.toml").exists():
        folder = checkout / "build"
        try:
            folder.mkdir(exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a folder for the compiled kernels, but {error}") from None
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _source_digest(flags: tuple[str, ...]) -> str:
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    texts = [part for path in files for part in (path.name, path.read_text("utf-8"))]
    variants = [" ".join((name, *extra)) for name, extra in _X86_VARIANTS.items()]
    return _digest(platform.machine(), *flags, *variants, *texts)


def _find_compiler() -> _Compiler | None:
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["g++", "clang++", "c++"]:
        try:
            command = tuple(shlex.split(candidate))
        except ValueError as error:
            raise UserError(f"expected CXX to be a command, found {candidate!r}: {error}") from None
        if not command or shutil.which(command[0]) is None:
            continue
        code, out, _ = _Compiler(command).run("--version")
        if code == 0 and out:
            return _Compiler(command, out.splitlines()[0])
    return None


def _compile(compiler: _Compiler, flags: Sequence[str], library: Path) -> None:
    variants: dict[str, tuple[str, ...]] = {}
    if platform.machine() in ("x86_64", "AMD64"):
        probe = ("-x", "c++", "-fsyntax-only", os.devnull)
        variants = {
            n: extra for n, extra in _X86_VARIANTS.items() if compiler.run(*extra, *probe)[0] == 0
        }
    # isa.cpp lists what was compiled: -DCPUX_AVX2 and so on.
    defines = tuple(f"-DCPUX_{name.removeprefix('kernels_').upper()}" for name in variants)
    units = {
        path: (*variants.get(path.stem, ()), *defines)
        for path in sorted(SOURCES.glob("*.cpp"))
        if path.stem not in _X86_VARIANTS or path.stem in variants
    }
    with tempfile.TemporaryDirectory(prefix=f"{_NAME}-build-", dir=library.parent) as scratch:
        objects = [str(Path(scratch) / f"{path.stem}.o") for path in units]
        commands = [
            (*flags, *extra, "-c", str(path), "-o", target)
            for (path, extra), target in zip(units.items(), objects, strict=True)
        ]
        pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        try:
            list(pool.map(lambda command: _checked(compiler, command), commands))
        except BaseException:  # one failed, or Ctrl-C: the others need not go on
            compiler.end_all()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        whole = Path(scratch) / library.name
        _checked(compiler, (*flags, "-shared", "-o", str(whole), *objects))
        data = whole.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    write_together({library: [data], _checksum_file(library): [checksum]})


def _checked(compiler: _Compiler, arguments: tuple[str, ...]) -> None:
    code, _, err = compiler.run(*arguments, limit_s=_UNIT_LIMIT_S)
    if code != 0:
        lines = [line for line in err.splitlines() if line.strip()] or ["no message"]
        problem = next((line for line in lines if "error" in line), lines[0])
        command = shlex.join((*compiler.command, *arguments))
        raise UserError(
            f"expected the CPU kernels to compile, but `{command}` failed: {problem:.300}"
        )


def main() -> int:
    """Build ahead of first use; prints the library's path."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    try:
        print(built_library(sanitize=parser.parse_args().sanitize))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
