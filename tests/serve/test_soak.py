"""A minute of mixed load; an hour is run by hand: python -m tests.serve.soak MODEL --minutes 60."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from puna.engine.llm import LLM
from tests.serve.processes import served
from tests.serve.soak import soak


@pytest.mark.slow
def test_a_minute_of_mixed_load(llm: LLM, tmp_path: Path) -> None:
    llm.save(tmp_path / "tiny")
    few_blocks = "engine.cache_memory=500000"  # so that sequences are put back, too
    with served(tmp_path / "tiny", few_blocks, "max_waiting=64", "header_seconds=3") as process:
        result = asyncio.run(soak(process, minutes=1, seed=1))
        faults = [line for line in process.log if line["event"] == "fault"]
    assert not result["faults"], result
    assert not faults
    assert result["tokens"] > 1000 and result["cancelled"] > 10
    assert result["preemptions"] > 0
    assert result["open_files"] < 100
