"""The report: right figures, right curves, nothing from outside, readable from whatever a run has left."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from puna.errors import CheckpointError
from puna.train.charts import MOST_POINTS, Axis, Curve, chart, number, share, smooth, thin
from puna.train.history import read_history
from puna.train.report import write_report

SETTINGS = """
out = "runs/small"
clip_norm = 1.0
[length]
steps = 100
[optimizer]
learning_rate = 0.0003
betas = [0.9, 0.95]
"""


def make_run(path: Path, records: list[dict[str, object]], tail: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "run.toml").write_text(SETTINGS)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def train(step: int, **values: object) -> dict[str, object]:
    timing = {"tokens_per_s": 2000.0, "utilisation": 0.5, "seconds": 0.25, "waiting": 0.002, "updating": 0.1}
    usual = {
        "kind": "train",
        "step": step,
        "tokens": 512 * step,
        "loss": 8.0 / step,
        "lr": 3e-4,
        "grad_norm": 0.5,
    }
    return {**usual, "timing": timing, **values}


def validation(step: int, loss: float) -> dict[str, object]:
    return {
        "kind": "validation",
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2,
    }


SUMMARY = {
    "kind": "summary",
    "step": 100,
    "loss": 2.5,
    "perplexity": 12.18,
    "bits_per_byte": 1.25,
    "gzip": 2.04,
    "xz": 1.61,
    "parameters": 5_700_352,
    "tokens": 51_200,
    "seconds": 75,
}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the page loads and says."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(path: Path, records: list[dict[str, object]], tail: str = "") -> Page:
    return Page(write_report(make_run(path, records, tail)).read_text(encoding="utf-8"))


def test_a_finished_run_shows_its_figures(tmp_path: Path) -> None:
    records = [train(step) for step in range(1, 101)] + [validation(50, 2.9), validation(100, 2.7), SUMMARY]
    said = report(tmp_path / "small", records).said
    assert "small Finished after 100 steps" in said
    for figure in (
        "Bits per byte 1.250 gzip 2.040 · xz 1.610",
        "Validation loss 2.5000 perplexity 12.18",
        "Training loss 0.0804 from 8.00 at the start",  # the mean of the last two: 8/99 and 8/100
        "Parameters 5.7M 5,700,352",
        "Tokens seen 51.2k 51,200",
        "Training time 1m15s 2k tokens/s",
        "learning_rate 3e-4",
        "betas 0.9, 0.95",
        "share of the measured matrix rate, median 50.0%; waiting for data: 0.2% of a step",
    ):
        assert figure in said


def test_an_unfinished_run_shows_how_far_it_came(tmp_path: Path) -> None:
    records = [train(step) for step in range(1, 41)] + [validation(20, 2.7), validation(40, 2.9)]
    said = report(tmp_path / "run", records, tail='{"kind": "train", "st').said
    assert "Step 40 of 100, not finished" in said
    assert "Bits per byte 1.350 on held-out text" in said  # the best so far, not the last
    assert "Validation loss 2.7000" in said
    assert "Tokens seen 20.5k" in said
    assert "Training time 10s" in said
    assert "1 line of metrics.jsonl could not be read and is left out." in said


@pytest.mark.parametrize(
    "lines", [None, "", "\n\n", "\xff\x00[[", '[1]\n"a"\n{"kind": 3}\n{"kind": "train"}\n']
)
def test_a_run_with_nothing_to_show_still_has_a_page(tmp_path: Path, lines: str | None) -> None:
    path = make_run(tmp_path / "run", [], lines or "")
    if lines is None:
        (path / "metrics.jsonl").unlink()
    said = Page(write_report(path).read_text(encoding="utf-8")).said
    assert "No step recorded yet" in said
    assert said.count("nothing recorded yet") == 5


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run directory: it holds no run\.toml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_needs_nothing_but_itself_and_runs_nothing(tmp_path: Path) -> None:
    page = report(tmp_path / "run", [train(1), train(2), validation(2, 2.0), SUMMARY])
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    )
    attributes = [attribute for _, attributes in page.tags for attribute in attributes]
    assert not [name for name in attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text


HOSTILE = '</p><script>alert(1)</script> & "x" \x00\x1b[31m \u202e\u2066 \ud83d {{ 7 * 7 }} {% raw %}'


def test_text_a_model_or_a_file_brings_cannot_break_the_page(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        train(1),
        {"kind": "sample", "step": 1, "prompt": HOSTILE, "text": HOSTILE},
        {"kind": "event", "step": 1, "text": HOSTILE},
        {"kind": "skipped", "step": 1, "reason": "the loss is nan", "documents": [HOSTILE, *"abcdefghij"]},
        train(2, **{HOSTILE: 1.0}),
    ]
    run = make_run(tmp_path / "run <b>", records)
    (run / "run.toml").write_text(f"name = {json.dumps('<script>')}")
    (run / "environment.json").write_text(json.dumps({"<i>": HOSTILE}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "run <b>" in page.said
    assert "<i>" in page.said
    assert "<script>alert(1)</script> &" in page.said
    assert "{{ 7 * 7 }}" in page.said
    assert "49" not in page.said
    assert not re.search("[\x00\x1b\u202e\u2066\ud83d]", page.said)
    assert "skipped: the loss is nan; documents: </p>" in page.said
    assert "a, b, c, d, e, f, g and 3 more" in page.said


def test_samples_keep_their_whitespace_and_are_few_and_short(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [train(1)]
    records += [
        {"kind": "sample", "step": step, "prompt": prompt, "text": f"f{step}(x):\n    return x\n"}
        for step in range(0, 1000, 5)
        for prompt in ("def ", "class ")
    ]
    records.append({"kind": "sample", "step": 1000, "prompt": "", "text": "long " * 10_000})
    page = report(tmp_path / "run", records)
    shown = [int(step.replace(",", "")) for step in re.findall(r"step ([\d,]+) (?:def|long)", page.said)]
    assert (len(shown), shown[0], shown[-1]) == (16, 0, 1000)
    assert "16 of 201 moments" in page.said
    assert "f0(x):\n    return x\n" in "".join(page.words)
    assert len("".join(page.words)) < 20_000


def test_a_quantity_unknown_to_the_page_gets_a_chart_of_its_own(tmp_path: Path) -> None:
    page = report(
        tmp_path / "run", [train(1, reward_margin=0.1), train(2, reward_margin=0.3), validation(2, 2.0)]
    )
    assert "reward margin training" in page.said
    assert page.said.count("nothing recorded yet") == 0


def test_two_reports_of_the_same_run_are_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [train(step) for step in range(1, 50)])
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_huge_run_makes_a_small_page_that_shows_every_spike(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 60_001):
            file.write(json.dumps(train(step, loss=2.0 + step % 7 / 100 + 10 * (step == 33_333))) + "\n")
    began = time.monotonic()
    path = write_report(run)
    assert time.monotonic() - began < 20
    assert path.stat().st_size < 400_000
    faint = re.search(r'<path class="faint c1" d="([^"]*)"', path.read_text(encoding="utf-8"))
    assert faint is not None
    points = [tuple(map(float, point.split())) for point in faint[1][1:].split("L")]
    assert len(points) <= MOST_POINTS
    assert [round(x) for x, y in points if y == 0.0] == [round(1000 * 33_333 / 60_000)]


# Charts


def test_a_chart_puts_values_where_its_ticks_say() -> None:
    drawn = chart("t", [Curve("a", [0, 50, 100], [0.0, 5.0, 10.0])], 100, from_zero=True)
    assert [(tick.place, tick.label) for tick in drawn.across] == [
        (0.0, "0"), (20.0, "20"), (40.0, "40"), (60.0, "60"), (80.0, "80"), (100.0, "100"),
    ]  # fmt: skip
    middle = 1000 * (1 - 5.0 / 10.4)  # 4% of room above the highest value
    assert drawn.curves[0].path == f"M0.0 1000.0L500.0 {middle:.1f}L1000.0 {1000 * (1 - 10 / 10.4):.1f}"
    assert [tick.label for tick in drawn.upward] == ["0", "5", "10"]
    ten = next(tick for tick in drawn.upward if tick.label == "10")
    assert ten.place == pytest.approx(100 * (1 - 10 / 10.4), abs=0.01)


def test_a_logarithmic_chart_spaces_factors_evenly() -> None:
    drawn = chart("t", [Curve("a", [0, 1, 2], [0.01, 1.0, 100.0])], 2, log=True)
    heights = [float(point.split()[1]) for point in drawn.curves[0].path[1:].split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert [tick.label for tick in drawn.upward] == ["0.01", "0.1", "1", "10", "100"]


def test_a_spike_in_a_faint_curve_is_cut_off_and_flattens_nothing() -> None:
    values = [1.0] * 99 + [1e6]
    drawn = chart(
        "t", [Curve("raw", range(100), values, "faint"), Curve("line", range(100), [1.0, *[2.0] * 99])], 99
    )
    assert drawn.curves[0].path.endswith("L1000.0 0.0")
    assert drawn.upward[0].label == "1"


def test_a_validation_point_says_what_it_is() -> None:
    drawn = chart("t", [Curve("validation", [1000], [2.34567], "dots")], 1000)
    assert [dot.label for dot in drawn.curves[0].dots] == ["step 1,000: 2.346"]


def test_smoothing_starts_at_the_first_value_follows_the_early_fall_and_keeps_a_constant() -> None:
    assert smooth([3.0] * 500) == pytest.approx([3.0] * 500)
    falling = [8.0 * 0.99**n for n in range(1000)]
    smoothed = smooth(falling)
    assert smoothed[0] == 8.0
    assert max(abs(a - b) for a, b in zip(falling, smoothed, strict=True)) < 0.8
    assert smooth([0.1, 0.7, 0.3]) == [0.1, 0.7, 0.3]
    noisy = [2.0 + (-1) ** n for n in range(1000)]
    assert abs(smooth(noisy)[-1] - 2.0) < 0.1


points = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(values=points, most=st.integers(4, 60))
@example(values=[float(n % 17) for n in range(400)], most=20)
def test_thinning_keeps_ends_order_and_extremes(values: list[float], most: int) -> None:
    steps = list(range(len(values)))
    kept = thin(steps, values, most)
    assert len(kept) <= max(most, 2)
    assert (kept[0], kept[-1]) == ((0, values[0]), (steps[-1], values[-1]))
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert all(values[int(step)] == value for step, value in kept)
    assert (min(v for _, v in kept), max(v for _, v in kept)) == (min(values), max(values))


@given(low=st.floats(-1e12, 1e12), span=st.floats(1e-6, 1e12), log=st.booleans())
def test_an_axis_has_a_few_ticks_inside_it(low: float, span: float, log: bool) -> None:
    if log:
        low = abs(low) + 1e-6
    axis = Axis(low, max(low + span, low * 1.1 if low > 0 else low / 1.1, low + 1e-6), log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 15
    assert ticks == sorted(ticks)
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)


@given(
    values=st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=50), log=st.booleans(), zero=st.booleans()
)
def test_any_finite_values_make_a_chart(values: list[float], log: bool, zero: bool) -> None:
    steps = range(len(values))
    drawn = chart(
        "t",
        [Curve("a", steps, values), Curve("b", steps, values, "faint")],
        len(values),
        log=log,
        from_zero=zero,
    )
    for curve in drawn.curves:
        for point in curve.path[1:].split("L"):
            assert all(0 <= float(place) <= 1000 for place in point.split())


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0.1 + 0.2, "0.3"),
        (3e-4, "3e-4"),
        (1.5e-7, "1.5e-7"),
        (25_000.0, "25k"),
        (0.0, "0"),
        (0.0015, "0.0015"),
    ],
)
def test_tick_labels(value: float, label: str) -> None:
    assert number(value) == label


def test_small_shares_can_be_told_apart() -> None:
    drawn = chart("t", [Curve("a", [0, 1], [0.0, 8000.0])], 1, from_zero=True, right=2.5e-6)
    assert [tick.label for tick in drawn.right] == ["0%", "0.5%", "1%", "1.5%", "2%"]
    assert [share(value) for value in (0.47, 1.0)] == ["47%", "100%"]


# History


def test_a_history_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "train", "step": 1, "loss": NaN, "lr": 1e-3}\n'
        '{"kind": "train", "step": 2, "loss": 2.5, "flag": true, "huge": 1' + "0" * 400 + "}\n"
        '{"kind": "train", "step": 3, "loss": Infinity, "timing": {"seconds": 0.5}}\n'
        '{"kind": "summary", "loss": 1.0, "xz": 2.0}\n{"kind": "summary", "loss": 0.5}\n'
    )
    history = read_history(path)
    columns = history.columns["train"]
    assert (list(columns["loss"].steps), list(columns["loss"].values)) == ([2.0], [2.5])
    assert (list(columns["seconds"].steps), list(columns["seconds"].values)) == ([3.0], [0.5])
    assert set(columns) == {"loss", "lr", "seconds"}
    assert (history.summary["loss"], history.summary["xz"]) == (0.5, 2.0)
