"""Line charts as plain numbers: curves in a box of 1000 × 1000, and ticks as percentages of its sides.

The page draws the box with SVG that stretches to any width, while strokes and text keep their size. Colours
are left to the page as well, so that a chart follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from puna.progress import quantity

BOX = 1000
TINY = 1e-200  # below, quotients leave the range of numbers: taken for nothing
MOST_POINTS = 1500  # of one curve on the page
Style = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Curve:
    """A named quantity by step; `faint` is what a smoothed line was made from."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Style = "line"
    colour: int = 1


@dataclass(frozen=True)
class Tick:
    """A label at a share of the axis, in percent from the left or from the top."""

    place: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point that is drawn as such, and says what it stands for."""

    path: str
    label: str


@dataclass(frozen=True)
class Drawn:
    """A curve as SVG path data."""

    name: str
    style: Style
    colour: int
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """All the page needs to draw one chart; `curves` is empty where nothing was recorded."""

    title: str
    note: str
    curves: list[Drawn] = field(default_factory=list)
    across: list[Tick] = field(default_factory=list)
    upward: list[Tick] = field(default_factory=list)
    right: list[Tick] = field(default_factory=list)  # the upward ticks in another unit
    marks: list[Tick] = field(default_factory=list)  # horizontal lines to compare with, named on the right


@dataclass(frozen=True)
class Axis:
    """Maps values to 0…1 between two ends, evenly or by logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The share of the way from the low end to the high one."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers along the axis."""
        if self.log and self.high / self.low >= 10:
            return _decades(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        return [
            step * n
            for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def chart(
    title: str,
    curves: Sequence[Curve],
    last_step: float,
    *,
    note: str = "",
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[tuple[str, float]] = (),
    right: float | None = None,
) -> Chart:
    """Lay out curves over steps from 0 to `last_step`, so that all charts of a run line up.

    `marks` are (name, value) of lines to compare with; `right` is a factor that turns values into shares, in
    percent on the right. The range follows lines and dots; faint curves are cut off where they leave it, so
    that one spike does not flatten all else.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return Chart(title, note)
    across = Axis(0.0, max(last_step, 1.0))
    firm = [curve for curve in curves if curve.style != "faint"] or curves
    values = [end for curve in firm for end in (min(curve.values), max(curve.values))]
    values += [value for _, value in marks] + ([0.0] if from_zero else [])
    upward = _span(values, log=log and min(values) > TINY, room=0.04)
    ticks = upward.ticks()
    return Chart(
        title,
        note,
        curves=[_draw(curve, across, upward) for curve in curves],
        across=[Tick(_percent(across.place(step)), quantity(step)) for step in across.ticks()],
        upward=[Tick(_percent(1 - upward.place(value)), number(value)) for value in ticks],
        right=[]
        if right is None
        else [Tick(_percent(1 - upward.place(value)), share(value * right)) for value in ticks],
        marks=[Tick(_percent(1 - upward.place(value)), name) for name, value in marks],
    )


def smooth(values: Sequence[float], window: float = 0.02) -> list[float]:
    """A running mean over the last `window` of the whole curve, and never more than the last tenth so far.

    A fixed window would lag far behind at the start, where a loss falls fastest.
    """
    longest, mean, smoothed = window * len(values), 0.0, []
    for count, value in enumerate(values, start=1):
        span = min(longest, count / 10)
        mean = mean + (value - mean) / span if span > 1 else value
        smoothed.append(mean)
    return smoothed


def thin(
    steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """At most `most` points: both ends, and the lowest and highest of every stretch: no spike is lost.

    >>> thin([0, 1, 2, 3, 4, 5], [0, 9, 1, 1, -9, 0], most=4)
    [(0, 0), (1, 9), (4, -9), (5, 0)]
    """
    points = list(zip(steps, values, strict=True))
    if len(points) <= most:
        return points
    stretches, inner = (most - 2) // 2, points[1:-1]
    kept = [points[0]]
    for n in range(stretches):
        stretch = inner[n * len(inner) // stretches : (n + 1) * len(inner) // stretches]
        lowest, highest = min(stretch, key=_value), max(stretch, key=_value)
        kept += sorted({lowest, highest})
    return [*kept, points[-1]]


def number(value: float) -> str:
    """A tick's label: short, and never with a rounding error's digits.

    >>> [number(x) for x in (0.30000000000000004, 0.0003, 25_000, 0.0)]
    ['0.3', '3e-4', '25k', '0']
    """
    if abs(value) >= 1000:
        return quantity(value)
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.3g}".partition("e")
        return f"{digits}e{int(power)}" if power else f"{value / 1e-4:.3g}e-4"
    return f"{value:.4g}"


def share(value: float) -> str:
    """A share in percent, with digits enough to tell small ones apart.

    >>> [share(x) for x in (0.47, 0.022, 0.0, 1.0)]
    ['47%', '2.2%', '0%', '100%']
    """
    return f"{100 * value:.0f}%" if abs(value) >= 0.1 else f"{100 * value:.2g}%"


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _draw(curve: Curve, across: Axis, upward: Axis) -> Drawn:
    points = [
        (step, value, BOX * across.place(step), BOX * min(1.0, max(0.0, 1 - upward.place(value))))
        for step, value in thin(curve.steps, curve.values)
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for _, _, x, y in points)
    dots = [
        Dot(f"M{x:.1f} {y:.1f}h0", f"step {step:,.0f}: {value:.4g}")
        for step, value, x, y in (points if curve.style == "dots" else [])
    ]
    return Drawn(curve.name, curve.style, curve.colour, path, dots)


def _span(values: Sequence[float], log: bool = False, room: float = 0.0) -> Axis:
    """An axis that holds the values with some room, and is never empty."""
    low, high = min(values), max(values)
    if log:
        ratio = max(high / low, 1.1) ** room
        return Axis(low / ratio, max(high, low * 1.1) * ratio, log=True)
    if high - low < TINY:
        reach = (abs(high) if abs(high) > TINY else 1.0) / 2
        high, low = high + reach, low - reach
    margin = room * (high - low)
    return Axis(low if low == 0 else low - margin, high + margin)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 5)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [factor * 10.0**power for power in powers[::every] for factor in factors]
    return [value for value in values if low <= value <= high]


def _percent(share: float) -> float:
    return round(100 * share, 2)
