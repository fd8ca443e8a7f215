"""A training run stopped at any moment goes on bit for bit: compiled, two threads, bfloat16, dropout.

Four runs are killed again and again, at named points inside a save and at random moments between, and resumed
each time; at their end they are compared with one that was left in peace. So is one whose disk ran full.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from puna.kernels.compiler import find_toolchain
from puna.train import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_toolchain().works, reason="compiling needs a C++ compiler and Python headers"
    ),
]

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "train" / "crash_driver.py"
STEPS = 40
RANDOM = "random"
MOMENTS = {  # of each run, in order
    "a": ["directory-made", RANDOM, "model-half-written", "model-written", RANDOM],
    "b": ["model-synced", "optimizer-half-written", RANDOM, "optimizer-synced", RANDOM],
    "c": [RANDOM, "state-written", "state-synced", RANDOM, "manifest-written"],
    "d": ["manifest-synced", RANDOM, "directory-synced", "renamed", RANDOM, "root-synced", "export-renamed"],
}
SETTINGS = f"""
out = "run"
seed = 1
device = "cpu"
length = {{ steps = {STEPS} }}
data = {{ train = ["text"], row_length = 64, holdout = 0.1 }}
tokenizer = {{ train = {{ vocab_size = 384 }} }}
batch = {{ rows = 8, micro_rows = 4 }}
precision = {{ dtype = "bfloat16" }}
determinism = {{ threads = 2 }}
compile = {{ mode = "on" }}
schedule = {{ warmup_steps = 5 }}
checkpoint = {{ every = 3 }}
validation = {{ every = 10, tokens = 2000 }}
samples = {{ every = 20, new_tokens = 8 }}
[model.fields]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
residual_dropout = 0.1
attention_dropout = 0.1
"""
WORDS = "the llama walks over high plain and eats grass while small winds move slow clouds to far white hills"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with text, settings, and the compiled kernels of all runs."""
    place = tmp_path_factory.mktemp("kill")
    (place / "run.toml").write_text(SETTINGS)
    (place / "text").mkdir()
    words = random.Random(3)
    for number in range(80):
        lines = [" ".join(words.choices(WORDS.split(), k=words.randint(4, 14))) for _ in range(60)]
        (place / "text" / f"{number:03}.txt").write_text(".\n".join(lines))
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    finish(place, "undisturbed")
    return place / "undisturbed"


def start(place: Path, out: str, *driver: str) -> subprocess.Popen[bytes]:
    """`puna pretrain --resume` in its own process, through the crash driver if it is to die at a point."""
    puna = [str(DRIVER), *driver, "--"] if driver else ["-m", "puna"]
    with (place / "stderr.txt").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, *puna, "pretrain", "run.toml", f"out={out}", "--resume"],
            cwd=place,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TORCHINDUCTOR_CACHE_DIR": str(place / "compiled"),
                "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads leave the core to others on a busy machine
            },
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def finish(place: Path, out: str) -> None:
    code = start(place, out).wait(timeout=600)
    assert code == 0, (place / "stderr.txt").read_text()


def records(run: Path) -> list[dict[str, Any]]:
    """What is on record; the last line of a killed run may be cut off."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def kill_at_point(place: Path, out: str, point: str) -> None:
    fell = place / f"{out}.fell"
    fell.unlink(missing_ok=True)
    occurrence = "1" if point.startswith("export") else "2"
    process = start(place, out, "--point", point, "--occurrence", occurrence, "--fell", str(fell))
    code = process.wait(timeout=600)
    assert code == -9, (place / "stderr.txt").read_text()
    assert fell.read_text() == point


def kill_at_random(place: Path, out: str, moments: random.Random) -> str:
    """Kill some steps beyond what is on record, anywhere inside a step; returns where it fell."""
    run = place / out
    target = min(last_step(run) + moments.randint(2, 5), STEPS - 1)
    process = start(place, out)
    deadline = time.monotonic() + 600
    while process.poll() is None and last_step(run) < target and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(moments.random() * 0.2)
    process.kill()
    assert process.wait() == -9, (place / "stderr.txt").read_text()
    assert target <= last_step(run) < STEPS or not finished(run)
    saving = [path.name for path in (run / "checkpoints").glob(".*")]
    return f"after step {last_step(run)}" + "".join(f", inside {name}" for name in saving)


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run) if record["kind"] == "train"), default=0)


def finished(run: Path) -> bool:
    return any(record["kind"] == "summary" for record in records(run))


def bare(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ: times, and where the run lies."""
    return {key: value for key, value in record.items() if key not in ("timing", "run", "model", "report")}


def assert_same_run(run: Path, undisturbed: Path) -> None:
    assert [bare(record) for record in records(run)] == [bare(record) for record in records(undisturbed)]
    trained = [record["step"] for record in records(run) if record["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    assert checkpoint.steps(run / "checkpoints") == checkpoint.steps(undisturbed / "checkpoints")
    for step in checkpoint.steps(run / "checkpoints"):
        killed, whole = (
            checkpoint.read(path / "checkpoints" / f"step-{step}") for path in (run, undisturbed)
        )
        assert killed.values["train"] == whole.values["train"]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()
    exported = [path / "model" / "model.safetensors" for path in (run, undisturbed)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


@pytest.mark.parametrize("out", MOMENTS)
def test_a_run_killed_again_and_again_ends_as_one_left_in_peace(
    place: Path, undisturbed: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = random.Random(out)
    for moment in MOMENTS[out]:
        if moment == RANDOM:
            fell = kill_at_random(place, out, moments)
        else:
            kill_at_point(place, out, moment)
            fell = f"{moment}, after step {last_step(place / out)}"
        with capsys.disabled():
            print(f"\n  run {out}: killed {fell}", end="", flush=True)
        assert not finished(place / out)
    finish(place, out)
    assert_same_run(place / out, undisturbed)


def test_the_moments_are_as_many_as_promised() -> None:
    every = [moment for moments in MOMENTS.values() for moment in moments]
    assert len(every) >= 20
    assert len(set(every) - {RANDOM}) >= 10
    assert every.count(RANDOM) >= 8


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(
    place: Path, undisturbed: Path
) -> None:
    run = place / "small"
    run.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(run)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("this machine does not let a test mount a small file system")
    try:
        process = start(place, "small")
        deadline = time.monotonic() + 600
        while process.poll() is None and last_step(run) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        fill(run / "data" / "ballast")
        assert process.wait(timeout=600) == 2
        last_line = (place / "stderr.txt").read_text().splitlines()[-1]
        assert last_line.startswith("puna: No space left on device while ")
        assert last_line.endswith("continue with --resume")
        assert not list((run / "checkpoints").glob(".*"))
        (run / "data" / "ballast").unlink()
        finish(place, "small")
        assert_same_run(run, undisturbed)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def fill(path: Path) -> None:
    """Leave no room on a file system."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
