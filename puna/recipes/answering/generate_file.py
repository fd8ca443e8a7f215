"""Answer a file of prompts as one continuous batch, into a file that a killed run goes on with."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.engine.completion import Completion
from puna.engine.fingerprint import fingerprint
from puna.engine.llm import LLM
from puna.engine.params import CONSTRAINTS, SamplingParams
from puna.errors import DataError, Interrupted, PunaError, SettingsError
from puna.progress import Track, Tracker, quantity
from puna.recipes.answering.answer_files import (
    AnswerFile,
    Record,
    answer_file,
    as_line,
    record_of,
    refuse_existing,
)
from puna.recipes.answering.generate import answered, is_incomplete
from puna.recipes.answering.options import SamplingOptions, chosen_seed, seed_of
from puna.recipes.answering.prompt_files import STANDARD, PromptLine, Survey, read_prompts, survey
from puna.settings import parse

Write = Callable[[str], None]
Put = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FileJob:
    """A file of prompts, the file that its answers go to, and how they are made.

    `prompts` and `out` may be "-": standard input, standard output. `template` is for conversations.
    """

    prompts: str
    out: str
    options: SamplingOptions
    template: str | None = None
    resume: bool = False


@dataclass
class Tally:
    """What was done; a resumed run counts the lines of those before it, and all else of its own.

    `shortened` are prompts whose oldest tokens were left out, `incomplete` answers that have a constraint and
    were cut before they satisfied it.
    """

    lines: int = 0
    failed: int = 0
    shortened: int = 0
    incomplete: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        parts = [f"{self.tokens:,} tokens, {quantity(self.rate)} tokens/s", f"{self.failed:,} lines failed"]
        if self.shortened:
            parts.append(f"{self.shortened:,} prompts were too long and lost their oldest tokens")
        if self.incomplete:
            parts.append(f"{self.incomplete:,} constrained answers were cut before they were complete")
        return "; ".join(parts)


def generate_file(job: FileJob, open_llm: Callable[[], LLM], write: Write, track: Track) -> dict[str, Any]:
    """Answer every line, in the order they finish; return the tally.

    An answer depends on nothing but its line, the settings and the model: where line k has no seed of its own
    it is the settings' + k - 1. So a run that was killed and resumed leaves the same lines as one that was
    not. What is wrong with a line is told in the place of its answer, and harms no other.

    Raises:
        InputError: the files, the settings or the model cannot be used.
        Interrupted: Ctrl-C or SIGTERM; what is answered is kept.
    """
    _refuse_impossible(job)
    found = None if job.prompts == STANDARD else survey(job.prompts)
    known = record_of(Path(job.out)) if job.resume else None
    seed = _seed(job, known)
    with contextlib.ExitStack() as stack:
        llm = open_llm()
        file = None
        if job.out != STANDARD:
            record = _record(job, llm, seed, found)
            file = stack.enter_context(answer_file(Path(job.out), record, job.resume))
        tracker = stack.enter_context(track("Answering", found.lines if found else 0, "lines"))
        if file is not None and found is not None and file.done:
            tracker.say(_resumed(file, found.lines))
        work = _Work(job, llm, seed, file, write, tracker)
        try:
            work.run()
        except (KeyboardInterrupt, SystemExit) as stop:
            number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
            raise Interrupted(number, f"stopped; {_kept(file)}") from None
        tally = work.tally
        tracker.say(str(tally))
    return {"seed": seed, **vars(tally), "tokens_per_second": tally.rate}


class _Work:
    """One run through the lines."""

    def __init__(
        self, job: FileJob, llm: LLM, seed: int, file: AnswerFile | None, write: Write, tracker: Tracker
    ) -> None:
        self._job, self._llm, self._seed, self._tracker = job, llm, seed, tracker
        self._done: set[int] = set() if file is None else file.done
        self._put: Put = (lambda answer: write(as_line(answer))) if file is None else file.put
        self.tally = Tally(len(self._done), 0 if file is None else file.failed)
        self._began = time.monotonic()
        if self._done:
            tracker.start_at(len(self._done))

    def run(self) -> None:
        """Answer what is not answered yet."""
        waiting: dict[int, PromptLine] = {}
        answers = self._llm.completions(self._requests(waiting), template=self._job.template)
        for number, outcome in answers:
            self._answer(waiting.pop(number), outcome)

    def _requests(
        self, waiting: dict[int, PromptLine]
    ) -> Iterator[tuple[str | list[Any], Mapping[str, Any]]]:
        """The lines that ask for something, as they are taken; `waiting` remembers them by their order."""
        asked = 0
        for line in read_prompts(self._job.prompts):
            if line.number in self._done:
                continue
            if line.fault is not None:
                self._answer(line, DataError(line.fault))
                continue
            waiting[asked] = line
            asked += 1
            prompt = line.prompt if line.messages is None else line.messages
            assert prompt is not None
            yield prompt, self._sampling(line)

    def _sampling(self, line: PromptLine) -> dict[str, Any]:
        """The settings of all lines, changed by the line's own; a constraint of its own replaces theirs."""
        common = dict(self._job.options.sampling)
        if any(name in line.sampling for name in CONSTRAINTS):
            common = {name: value for name, value in common.items() if name not in CONSTRAINTS}
        own = line.sampling.get("seed")
        seed = seed_of(self._seed, line.number) if own is None else own
        return {**common, **line.sampling, "seed": seed}

    def _answer(self, line: PromptLine, outcome: Completion | PunaError) -> None:
        tally = self.tally
        if isinstance(outcome, Completion):
            sampling = self._sampling(line)
            self._put({**line.named, **line.asked, "seed": sampling["seed"], **answered(outcome)})
            params = parse(SamplingParams, sampling, "sampling")
            tally.shortened += outcome.dropped > 0
            tally.incomplete += any(is_incomplete(one, params) for one in (outcome, *outcome.alternatives))
            tally.tokens += sum(len(one.tokens) for one in (outcome, *outcome.alternatives))
        else:
            self._put({**line.named, "error": str(outcome)})
            tally.failed += 1
        tally.lines += 1
        tally.seconds = time.monotonic() - self._began
        self._tracker.advance(1, f"{quantity(tally.rate)} tokens/s")


def _refuse_impossible(job: FileJob) -> None:
    """What can be known to fail before anything is read."""
    if job.resume and STANDARD in (job.prompts, job.out):
        raise SettingsError("--resume needs files: give --prompts and --out by name")
    if Path(job.out).suffix.lower() in (".gz", ".zst"):
        raise SettingsError(f"{job.out}: answers are written as plain JSON lines; leave out the last suffix")
    if job.out != STANDARD and not job.resume:
        refuse_existing(Path(job.out))


def _seed(job: FileJob, known: Record | None) -> int:
    """The one given, else the one that the answers so far were made with, else a new one."""
    given: int | None = job.options.sampling.get("seed")
    if given is not None:
        return given
    return chosen_seed(None if known is None else known.sampling.seed)


def _record(job: FileJob, llm: LLM, seed: int, found: Survey | None) -> Record:
    return Record(
        model=fingerprint(llm),
        source=llm.source,
        prompts=STANDARD if found is None else found.sha256,
        lines=0 if found is None else found.lines,
        sampling=parse(SamplingParams, {**job.options.sampling, "seed": seed}, "sampling"),
        template=job.template,
        cache_dtype=job.options.engine.cache_dtype,
        deterministic=job.options.engine.deterministic,
    )


def _resumed(file: AnswerFile, lines: int) -> str:
    """What a resumed run finds."""
    done = len(file.done)
    failed = f", {file.failed:,} of them with an error" if file.failed else ""
    return (
        f"all {done:,} lines are answered already{failed}"
        if done == lines
        else f"{done:,} of {lines:,} lines are answered already{failed}"
    )


def _kept(file: AnswerFile | None) -> str:
    if file is None:
        return "with --out FILE it could be gone on with"
    return f"the answers so far are in {file.path}: run it again with --resume"
