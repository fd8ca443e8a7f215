from __future__ import annotations

import pytest

from puna.errors import SettingsError
from puna.settings import parse
from puna.train.schedule import ScheduleSettings, check, learning_rate

GOLDEN = {  # warm-up of 3 steps, peak 1, minimum 0.1, 8 steps; by hand: 0.1 + 0.9 (1 + cos(π k/4)) / 2
    "cosine": [0.25, 0.5, 0.75, 1.0, 0.8681980515, 0.55, 0.2318019485, 0.1],
    "linear": [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1],
    "constant": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rates(name: str) -> None:
    settings = ScheduleSettings(name=name, warmup_steps=3, minimum=0.1)
    rates = [learning_rate(settings, 1.0, step, 8) for step in range(8)]
    assert rates == pytest.approx(GOLDEN[name], abs=1e-9)


def test_llama_7b() -> None:
    """2,000 steps of warm-up to 3e-4, and 10% of it at the end of 250,000 (arXiv 2302.13971, section 2.3)."""
    settings = ScheduleSettings(warmup_steps=2000)
    assert learning_rate(settings, 3e-4, 2000, 250_000) == 3e-4
    assert learning_rate(settings, 3e-4, 249_999, 250_000) == pytest.approx(3e-5)
    assert learning_rate(settings, 3e-4, 125_999, 250_000) == pytest.approx(1.65e-4, rel=1e-4)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(ScheduleSettings(warmup_steps=0), 0.5, 0, 1) == 0.5


def test_warm_up_must_end_before_the_run() -> None:
    check(ScheduleSettings(warmup_steps=9), 10)
    with pytest.raises(SettingsError, match=r"warmup_steps must be below the number of steps, got 10 of 10"):
        check(ScheduleSettings(warmup_steps=10), 10)


def test_an_unknown_schedule_is_told_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r"got 'cosin'\. Did you mean 'cosine'\?"):
        parse(ScheduleSettings, {"name": "cosin"})
