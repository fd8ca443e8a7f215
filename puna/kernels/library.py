"""C++ files of this package as loaded libraries: compiled at first use, and kept for the next process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from puna.kernels.compiler import build, default_compiler, missing

SECONDS = 300  # a slow machine, or one that is busy
OTHERS = stat.S_IRWXG | stat.S_IRWXO
NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
"""How kernels name the number types that they compute in."""


@dataclass(frozen=True)
class Library:
    """A compiled file; `fault` says in one line why there is none, "" if there is."""

    functions: ctypes.CDLL | None
    fault: str = ""
    seconds: float = 0.0
    """Spent on compiling now; 0 where it was found compiled."""


@functools.cache
def load(name: str) -> Library:
    """`<name>.cpp` of this directory, compiled for this very processor; once per process.

    It spreads its work over the threads that torch has, by way of `team.cpp` where that has them at hand.
    """
    library = compiled(Path(__file__).with_name(f"{name}.cpp"), default_compiler(), cache_directory())
    if library.functions is not None:
        library.functions.use_threads(*_threads(name))
        if sys.platform != "win32":  # a child has none of the threads, and would wait for them
            os.register_at_fork(after_in_child=partial(library.functions.use_threads, None, None, None))
    return library


def _threads(name: str) -> Sequence[ctypes.c_void_p | None]:
    """How a library gets threads: `fork_threads`, `leads` and `with_team` of threads.hpp."""
    team = None if name == "team" else load("team").functions
    if team is None:
        return ctypes.c_void_p(openmp_fork()), None, None
    return [ctypes.cast(call, ctypes.c_void_p) for call in (team.share, team.leads, team.with_team)]


def must_compile() -> bool:
    """Whether a kernel of this package is yet to be compiled for this processor, which takes a while."""
    compiler, directory = default_compiler(), cache_directory()
    sources = Path(__file__).parent.glob("*.cpp")
    try:
        if missing(compiler):
            return False
        return directory is None or not all(_intact(_place(x, compiler, directory)) for x in sources)
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def cache_directory() -> Path | None:
    """`$XDG_CACHE_HOME/puna/kernels`, or the same in `~/.cache`; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(named) if Path(named).is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return base / "puna" / "kernels"


def compiled(source: Path, compiler: str, directory: Path | None) -> Library:
    """A source's library from `directory`, or built and put there.

    Where the directory cannot be used, or others could put their code into it, the library is built anew in
    every process.
    """
    begun = time.perf_counter()
    try:
        if fault := missing(compiler):
            return Library(None, fault)
        kept = _place(source, compiler, directory) if directory and _private(directory) else None
        if kept is not None and (known := _loaded(kept)):
            return Library(known)
        with tempfile.TemporaryDirectory(prefix="puna-kernels-", dir=kept and directory) as name:
            fresh = Path(name, f"{source.stem}.so")
            if fault := build(compiler, source, fresh, _flags(), SECONDS):
                return Library(None, fault)
            functions = ctypes.CDLL(str(fresh))
            if kept is not None:  # only now: what does not load is not kept
                with contextlib.suppress(OSError):  # a full disk: the next process compiles again
                    _keep(fresh, kept)
        return Library(functions, seconds=time.perf_counter() - begun)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Library(None, f"the compiled {source.name} cannot be used: {error}")


def openmp_fork() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch uses; None where it uses another kind.

    Two runtimes in one process would spin against each other for the same cores. LLVM's and Intel's also go
    by this name.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if library is None:
        return None
    try:  # looked up among what this library depends on
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _place(source: Path, compiler: str, directory: Path) -> Path:
    return directory / f"{source.stem}-{_key(source, compiler)}.so"


def _flags() -> Sequence[str]:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ("-std=c++17", "-O3", native, "-fno-math-errno", "-ffp-contract=fast")


def _key(source: Path, compiler: str) -> str:
    """What decides the result: source, headers beside it, flags, compiler, and the processor compiled for."""
    texts = [part for x in (source, *_headers(source)) for part in (x.name.encode(), x.read_bytes())]
    parts = (*texts, " ".join(_flags()).encode(), compiler.encode(), _version(compiler), _processor())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


@functools.cache
def _version(compiler: str) -> bytes:
    command = [*shlex.split(compiler), "--version"]
    return subprocess.run(command, capture_output=True, check=False, timeout=SECONDS).stdout


def _headers(source: Path) -> Sequence[Path]:
    return sorted(source.parent.glob("*.hpp"))


@functools.cache
def _processor() -> bytes:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return f"{platform.machine()} {platform.processor()} {platform.platform()}".encode()
    names = ("model name", "flags", "features", "cpu implementer", "cpu part")
    lines = information.read_text(errors="replace").splitlines()
    # Cores of one machine may differ; every kind is named once.
    return "\n".join(sorted({line for line in lines if line.lower().startswith(names)})).encode()


def _private(directory: Path) -> bool:
    """Whether only this user can write here: what lies here is run."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        if found.st_mode & OTHERS:
            directory.chmod(0o700)
        return os.access(directory, os.W_OK)
    except OSError:
        return False


def _loaded(kept: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(kept)) if _intact(kept) else None
    except OSError:
        return None


def _intact(library: Path) -> bool:
    """Whether the file is this user's and as it was written: a cut one would end the process when loaded."""
    try:
        found = library.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return False
        return _sum_of(library).read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _keep(fresh: Path, kept: Path) -> None:
    """Put a library and its checksum in place, each whole; another process may be doing the same."""
    total = fresh.with_suffix(".sum")
    total.write_text(_digest(fresh))
    # A copy is renamed: what this process has loaded must not change under it.
    copy = fresh.with_suffix(".copy")
    shutil.copyfile(fresh, copy)
    copy.replace(kept)
    total.replace(_sum_of(kept))


def _sum_of(library: Path) -> Path:
    return library.with_suffix(".sum")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()
