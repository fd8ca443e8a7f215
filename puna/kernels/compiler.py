"""Building C++ on this machine: the compiler, whether it works, and what torch.compile needs on a CPU."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (
    '#include <Python.h>\n#include <cmath>\nextern "C" double probe(double x) { return std::sqrt(x); }\n'
)
SECONDS = 60  # a compiler on a cold network disk may take long; one that hangs must not stop the run


@dataclass(frozen=True)
class Toolchain:
    """The C++ compiler that torch.compile will call; `fault` says why it would fail, "" if it works."""

    compiler: str
    fault: str = ""

    @property
    def works(self) -> bool:
        """Whether a shared library that includes Python.h was built."""
        return not self.fault


@functools.lru_cache(maxsize=1)
def find_toolchain() -> Toolchain:
    """The machine's toolchain, tried once per process by building a three-line library."""
    return try_toolchain(default_compiler())


def default_compiler() -> str:
    """`$CXX`, or what torch calls: `clang++` on a Mac, elsewhere `g++`."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def try_toolchain(compiler: str, headers: Path | None = None) -> Toolchain:
    """Build a library with a compiler (`$CXX`, by torch's own rule) and Python's headers.

    A missing or broken toolchain is an answer, not an error.
    """
    headers = headers or Path(sysconfig.get_path("include"))
    if fault := missing(compiler):
        return Toolchain(compiler, fault)
    if not (headers / "Python.h").is_file():
        return Toolchain(compiler, f"{headers} holds no Python.h; install python3-dev or python3-devel")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    with tempfile.TemporaryDirectory(prefix="puna-toolchain-") as name:
        source = Path(name, "probe.cpp")
        source.write_text(PROGRAM)
        flags = [*openmp, f"-I{headers}"]
        return Toolchain(compiler, build(compiler, source, source.with_suffix(".so"), flags))


def missing(compiler: str) -> str:
    """One line if there is no such compiler, "" if there is."""
    command = shlex.split(compiler)  # CXX may hold flags, or a wrapper such as ccache
    if not command or shutil.which(command[0]) is None:
        return f"there is no C++ compiler ({compiler}); install g++ or clang"
    return ""


def build(compiler: str, source: Path, library: Path, flags: Sequence[str], seconds: float = SECONDS) -> str:
    """Build a shared library from one source; one line says why it failed, "" if it did not."""
    command = shlex.split(compiler)
    arguments = ["-shared", "-fPIC", *flags, str(source), "-o", str(library)]
    if sys.platform == "darwin":
        arguments += ["-undefined", "dynamic_lookup"]
    try:
        subprocess.run([*command, *arguments], capture_output=True, check=True, timeout=seconds)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{command[0]} cannot build a library: {lines[0] if lines else f'status {error.returncode}'}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} cannot be run: {error}"
    return ""
