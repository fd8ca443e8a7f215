"""What converting a large model takes: seconds, the share of a plain copy's rate, and memory.

    python benchmarks/conversion.py DIRECTORY [--preset llama-2-7b] [--tokenizer PATH] [--verify]

Makes a checkpoint of random weights in bfloat16 in DIRECTORY (where it is not there already), copies it with
cp, and converts it along a ring of formats with `puna convert`. Memory is the most that was anonymous: pages
of mapped files are the system's to take back. Linux only. A 7B model wants 45 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import puna.tokenizer
from puna import formats
from puna.formats.huggingface.directory import HuggingFaceSettings
from puna.model.initial import initial_weights
from puna.model.presets import preset
from puna.progress import on_stderr

RING = [  # from, to, format, options
    ("hf", "bf16.gguf", "gguf", []),
    ("bf16.gguf", "meta", "meta", ["--shards", "2"]),
    ("meta", "hf-again", "hf", []),
    ("hf", "q8_0.gguf", "gguf", ["--dtype", "q8_0"]),
    ("q8_0.gguf", "hf-expanded", "hf", []),
    ("hf", "int8.bin", "llama2c", ["--dtype", "int8", "--weights-only"]),
]


def main() -> None:
    options = _options()
    root: Path = options.directory
    root.mkdir(parents=True, exist_ok=True)
    _make(root / "hf", options.preset, options.tokenizer)
    size = _size(root / "hf")
    copying = _copy(root / "hf", root / "copy")
    print(f"copying {size / 1e9:.2f} GB takes {copying:.1f} s: {size / copying / 1e6:.0f} MB/s", flush=True)
    used: dict[str, int] = {}
    for source, target, kind, extra in RING:
        verify = [] if options.verify else ["--no-verify"]
        command = ["convert", str(root / source), str(root / target), "--to", kind, *extra, *verify]
        seconds, memory = _run(command)
        used[target] = _size(root / target)
        moved = (_size(root / source) + used[target]) / 2
        share = (moved / seconds) / (size / copying)
        row = {
            "from": source,
            "to": target,
            "verified": options.verify,
            "seconds": round(seconds, 1),
            "MB/s": round(moved / seconds / 1e6),
            "of the copy's rate": round(share, 2),
            "anonymous MiB": memory >> 20,
        }
        print(json.dumps(row), flush=True)
        if source not in ("hf", "bf16.gguf"):
            _remove(root / source)
    for path in sorted(root.iterdir()):
        if path.name != "hf":
            _remove(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--verify", action="store_true")
    return parser.parse_args()


def _make(path: Path, name: str, tokenizer: Path | None) -> None:
    if not path.exists():
        with on_stderr("Making random weights", 1, "models") as bar:
            formats.save(
                path,
                initial_weights(preset(name), seed=0),
                None if tokenizer is None else puna.tokenizer.load(tokenizer),
                settings=HuggingFaceSettings(dtype="bfloat16"),
            )
            bar.advance(1)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _copy(source: Path, target: Path) -> float:
    """Seconds to copy a directory, on the disk and not only in the cache."""
    _remove(target)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "--file-system", target], check=True)
    seconds = time.perf_counter() - began
    _remove(target)
    return seconds


def _run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most anonymous memory at any moment, in bytes."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "puna", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    status = Path("/proc") / str(process.pid) / "status"
    while process.poll() is None:
        most = max(most, _anonymous(status))
        time.sleep(0.1)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(process.stderr.read())
    return time.perf_counter() - began, most


def _anonymous(status: Path) -> int:
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.puna.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
