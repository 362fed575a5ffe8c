"""Compiles the CPU kernels: one shared library with every instruction set, chosen at run time.

The library's name carries a digest of its sources and flags and one of the compiler, so a stale
build is never loaded. A build goes to a temporary name under a file lock and is renamed when
whole: processes that start together compile once and never load half a file.

`python -m moe_offload.kernels.build` builds ahead of the first use; `--sanitize` adds
AddressSanitizer and UndefinedBehaviorSanitizer, for a process that has their runtime preloaded.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_offload.errors import UserError
from moe_offload.files import user_cache

_SOURCES: Final = Path(__file__).resolve().parent / "cpp"

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


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    version: str


def built_library(sanitize: bool = False) -> Path:
    """The path of the up-to-date shared library, compiled first where it is missing or stale.

    Says so in one line on stderr. UserError when there is no compiler and no earlier build, or
    when the compiler fails.
    """
    flags = (*_COMMON, *(_SANITIZED if sanitize else _OPTIMISED))
    folder = _build_folder()
    stem = f"cpu_experts{'_sanitized' if sanitize else ''}-{_source_digest(flags)}"
    compiler = _find_compiler()
    if compiler is None:
        earlier = sorted(folder.glob(f"{stem}-*.so"))
        if earlier:
            return earlier[0]
        raise UserError(
            "expected a C++17 compiler for the CPU kernels, found neither $CXX nor g++, clang++ or "
            "c++ on PATH: install g++ (Debian, Ubuntu: apt install g++)"
        )
    library = folder / f"{stem}-{_digest(compiler.version)}.so"
    if library.exists():
        return library
    with (folder / "cpu_experts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # another process may have built it meanwhile
            print(f"compiling the CPU kernels with {compiler.version} (once)", file=sys.stderr)
            _compile(compiler, flags, library)
            for old in folder.glob(f"{stem.partition('-')[0]}-*.so"):
                if old != library:
                    old.unlink(missing_ok=True)
    return library


def _build_folder() -> Path:
    """`build/` of the checkout; the user's cache where there is none or it cannot be written."""
    source, checkout = _SOURCES.parents[2:4]
    if source.name == "src" and (checkout / "pyproject.toml").exists():
        folder = checkout / "build"
        try:
            folder.mkdir(exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass
    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _source_digest(flags: tuple[str, ...]) -> str:
    files = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    texts = [part for path in files for part in (path.name, path.read_text())]
    variants = [" ".join((name, *extra)) for name, extra in _X86_VARIANTS.items()]
    return _digest(platform.machine(), *flags, *variants, *texts)


def _find_compiler() -> _Compiler | None:
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["g++", "clang++", "c++"]:
        command = tuple(shlex.split(candidate))
        if not command or shutil.which(command[0]) is None:
            continue
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        if shown.returncode == 0 and shown.stdout:
            return _Compiler(command, shown.stdout.splitlines()[0])
    return None


def _accepts(compiler: _Compiler, flags: tuple[str, ...]) -> bool:
    probe = [*compiler.command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _compile(compiler: _Compiler, flags: tuple[str, ...], library: Path) -> None:
    variants: dict[str, tuple[str, ...]] = {}
    if platform.machine() in ("x86_64", "AMD64"):
        variants = {n: extra for n, extra in _X86_VARIANTS.items() if _accepts(compiler, extra)}
    # api.cpp lists what was compiled: -DCPUX_AVX2 and so on.
    defines = tuple(f"-DCPUX_{name.removeprefix('kernels_').upper()}" for name in variants)
    units = {
        path: (*variants.get(path.stem, ()), *defines)
        for path in sorted(_SOURCES.glob("*.cpp"))
        if path.stem not in _X86_VARIANTS or path.stem in variants
    }
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [str(Path(scratch) / f"{path.stem}.o") for path in units]
        commands = [
            [*compiler.command, *flags, *extra, "-c", str(path), "-o", target]
            for (path, extra), target in zip(units.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, commands))
        whole = str(Path(scratch) / library.name)
        _run([*compiler.command, *flags, "-shared", "-o", whole, *objects])
        Path(whole).replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        problem = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise UserError(
            f"expected the CPU kernels to compile, but `{shlex.join(command)}` failed: {problem}"
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
