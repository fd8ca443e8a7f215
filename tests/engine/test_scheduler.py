"""Every sequence finishes, with the answer it has alone: a small model reads what its blocks really hold."""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.blocks import BlockPool, first_needed
from puna.engine.params import SamplingParams
from puna.engine.scheduler import HEAD_START, Part, Scheduler
from puna.engine.sequence import Sequence
from puna.errors import ResourceError

END, V = 0, 50


class Machine:
    """A scheduler, and a model whose every token depends on all keys that it sees, as they stand in memory.

    A key is made of its token, its position, the salt and all that came before it.
    """

    def __init__(
        self, blocks: int, size: int, step_tokens: int, running: int, window: int | None, sharing: bool = True
    ) -> None:
        self.pool = BlockPool(blocks, size, sharing)
        self.scheduler = Scheduler(self.pool, step_tokens, running, window)
        self.step_tokens, self.most, self.window = step_tokens, running, window
        self.memory: dict[int, dict[int, int]] = defaultdict(dict)  # block → offset → key
        self.alive: list[Sequence] = []
        self.steps = self.rows = 0

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.alive.append(sequence)

    def plan(self) -> list[Part]:
        parts = self.scheduler.plan()
        self.check(parts)
        return parts

    def step(self) -> bool:
        parts = self.plan()
        tokens = self.compute(parts)
        self.scheduler.done(parts)
        self.steps += 1
        self.rows += sum(part.count for part in parts)
        self.advance(tokens)
        return bool(parts)

    def compute(self, parts: list[Part]) -> dict[Sequence, int]:
        """Write every row's key, then let the rows that are sampled see what is there."""
        for part in parts:
            for position, key in enumerate(keys_of(part.sequence)):
                if part.start <= position < part.start + part.count:
                    index, offset = divmod(position, self.pool.size)
                    self.memory[part.sequence.blocks[index]][offset] = key
        return {part.sequence: self.token(part) for part in parts if self.sees_its_own(part) and part.samples}

    def sees_its_own(self, part: Part) -> bool:
        first = first_needed(part.start, self.window)
        expected = keys_of(part.sequence)[first : part.start + part.count]
        assert self.seen(part.sequence, first, part.start + part.count) == expected
        return True

    def seen(self, sequence: Sequence, first: int, end: int) -> list[int]:
        places = [divmod(position, self.pool.size) for position in range(first, end)]
        return [self.memory[sequence.blocks[index]][offset] for index, offset in places]

    def token(self, part: Part) -> int:
        end = part.start + part.count
        return chosen(self.seen(part.sequence, first_needed(end - 1, self.window), end))

    def advance(self, tokens: dict[Sequence, int]) -> None:
        for sequence, token in tokens.items():
            if sequence.finish_reason is None:
                sequence.push(token)
            if sequence.finish_reason is not None:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        if sequence in self.alive:
            self.alive.remove(sequence)

    def check(self, parts: list[Part]) -> None:
        """What holds for every plan."""
        shares = {part.sequence: part for part in parts}
        assert len(shares) == len(parts)
        assert sum(part.count for part in parts) <= self.step_tokens
        assert bool(parts) == bool(self.alive)
        for sequence, part in shares.items():
            end = part.start + part.count
            assert part.start == sequence.computed < end <= len(sequence.ids)
            assert part.samples == (end == len(sequence.ids))
            assert len(sequence.blocks) * self.pool.size >= end
        if self.alive:
            assert min(self.alive, key=lambda sequence: sequence.rank) in shares
        self.check_blocks(shares)

    def check_blocks(self, shares: dict[Sequence, Part]) -> None:
        """The pool holds what the running hold, and two hold one block only where they mean the same."""
        running = [sequence for sequence in self.alive if sequence.content is not None]
        assert len(running) == self.scheduler.running <= self.most
        assert len(running) + self.scheduler.waiting == len(self.alive)
        assert all(sequence in shares for sequence in running if len(sequence.ids) - sequence.computed == 1)
        meaning: dict[int, tuple] = {}
        for sequence in running:
            for index, block in enumerate(sequence.blocks):
                if block is None:
                    visible = first_needed(sequence.computed, self.window)
                    assert (index + 1) * self.pool.size <= visible
                    continue
                end = (index + 1) * self.pool.size
                computed = end <= sequence.computed
                known = (sequence.salt, tuple(sequence.ids[:end])) if computed else (sequence,)
                assert meaning.setdefault(block, known) == known
        assert self.pool.used == len(meaning)
        assert [
            sequence.blocks for sequence in self.alive if sequence.content is None and sequence.blocks
        ] == []


def keys_of(sequence: Sequence) -> list[int]:
    # Numbers alone: a string's hash, and None's before Python 3.12, is another one in every process.
    keys, key = [], hash((-1 if sequence.salt is None else sequence.salt,))
    for position, token in enumerate(sequence.ids):
        key = hash((key, position, token))
        keys.append(key)
    return keys


def chosen(keys: list[int]) -> int:
    return hash(tuple(keys)) % V


def alone(sequence: Sequence, window: int | None) -> list[int]:
    """The answer of a fresh sequence, without blocks or company."""
    while sequence.finish_reason is None:
        sequence.push(chosen(keys_of(sequence)[first_needed(len(sequence.ids) - 1, window) :]))
    return sequence.tokens


def sequence_of(prompt: list[int], context: int = 10_000, salt: int | None = None, **params: Any) -> Sequence:
    return Sequence(prompt, SamplingParams(**params), [END], context, None, anchor=1, salt=salt)


class Load:
    """Random requests for a random machine."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pick = self.random.randint
        self.window = self.random.choice([None, None, pick(1, 5), pick(6, 30)])
        self.step_tokens = pick(1, 24)
        size = pick(1, 5)
        self.context = pick(8, 40)
        blocks = pick(1, 4) + int(self.random.choice([0.5, 1, 1, 3]) * self.context) // size
        running = pick(1, 8)
        self.machine = Machine(
            blocks, size, self.step_tokens, running, self.window, self.random.random() < 0.9
        )
        self.beginnings = [[pick(1, 4) for _ in range(30)] for _ in range(3)]
        self.made: list[tuple[Sequence, dict[str, Any]]] = []

    def request(self) -> None:
        pick = self.random.randint
        overflow = self.random.choice(["refuse", "truncate", "slide"])
        longest = self.context - 1 if overflow == "refuse" else self.context + 15
        beginning = self.random.choice(self.beginnings)[: pick(0, 30)]
        prompt = [*beginning, *[pick(1, 4) for _ in range(pick(1, 12))]][:longest]
        made = {
            "prompt": prompt,
            "context": self.context,
            "salt": self.random.choice([None, None, 3]),
            "overflow": overflow,
            "max_new_tokens": pick(1, self.context * (2 if overflow == "slide" else 1)),
            "priority": self.random.choice([0, 0, 0, 1, -1]),
            "prompt_logprobs": self.random.choice([None, None, None, 0]),
            "ignore_eos": self.random.random() < 0.5,
        }
        sequence = sequence_of(**made)
        try:
            self.machine.add(sequence)
        except ResourceError:
            span = sequence.longest if self.window is None else self.window
            assert span + self.machine.pool.size > self.machine.pool.count * self.machine.pool.size
        else:
            self.made.append((sequence, made))

    def disturb(self) -> None:
        """Cancel someone; forget all that is kept; plan a step that never is computed, or only in part."""
        machine, chance = self.machine, self.random.random()
        if chance < 0.03 and machine.alive:
            self.cancel(self.random.choice(machine.alive))
        elif chance < 0.04:
            machine.pool.forget()
        elif chance < 0.08:
            parts = machine.plan()
            if self.random.random() < 0.5:
                machine.compute(parts)
        elif chance < 0.12:
            parts = machine.plan()
            tokens = machine.compute(parts)
            if parts:
                self.cancel(self.random.choice(parts).sequence)
            machine.scheduler.done(parts)
            machine.advance(tokens)

    def cancel(self, sequence: Sequence) -> None:
        sequence.cancel()
        self.machine.end(sequence)

    def serve(self, requests: int) -> None:
        while requests or self.machine.alive:
            arrivals = min(requests, self.random.choice([0, 0, 0, 1, 1, 4]))
            requests -= arrivals
            for _ in range(arrivals):
                self.request()
            self.disturb()
            self.machine.step()
            assert self.machine.steps < 100_000

    def check_end(self) -> None:
        machine = self.machine
        assert (machine.scheduler.running, machine.scheduler.waiting) == (0, 0)
        assert (machine.pool.used, machine.pool.free) == (0, machine.pool.count)
        assert machine.scheduler.plan() == []
        while machine.pool.take() is not None:
            pass
        # No content is remembered that no block holds.
        assert all(beginning.uses == 0 for beginning in machine.pool._beginnings.values())
        for sequence, made in self.made:
            assert sequence.blocks == []
            expected = alone(sequence_of(**made), self.window)
            if sequence.finish_reason == "cancelled":
                assert sequence.tokens == expected[: len(sequence.tokens)]
            else:
                assert sequence.tokens == expected


def test_answers_under_any_load_are_those_of_each_alone() -> None:
    seen: Counter[str] = Counter()
    for seed in range(150):
        load = Load(seed)
        load.serve(requests=15)
        load.check_end()
        seen["preempted"] += load.machine.scheduler.preemptions
        for sequence, _ in load.made:
            seen[str(sequence.finish_reason)] += 1
            seen["long"] += len(sequence.prompt) + len(sequence.tokens) > load.context
    # The loads are hard enough to mean something.
    assert all(seen[name] > 100 for name in ("preempted", "stop", "length", "cancelled", "long")), seen


@settings(max_examples=30)
@given(st.integers(1000, 10**9), st.integers(1, 6))
def test_any_load(seed: int, requests: int) -> None:
    load = Load(seed)
    load.serve(requests)
    load.check_end()


def served(machine: Machine, *sequences: Sequence) -> list[int]:
    """Rows of each step until all are finished."""
    for sequence in sequences:
        machine.add(sequence)
    rows = []
    while machine.alive:
        before = machine.rows
        machine.step()
        rows.append(machine.rows - before)
    return rows


def test_a_low_priority_is_served_whatever_comes() -> None:
    machine = Machine(blocks=40, size=4, step_tokens=8, running=2, window=None)
    low = sequence_of([1] * 10, max_new_tokens=20, ignore_eos=True)
    machine.add(low)
    # Twice as much as can be served, all of it more urgent by one level.
    for step in range(20 * HEAD_START):
        machine.add(sequence_of([2, step], max_new_tokens=4, ignore_eos=True, priority=1))
        machine.step()
        if low.finish_reason:
            break
    # Those who came within HEAD_START steps go first; each takes four steps of one of two places.
    assert HEAD_START < step < 2 * HEAD_START + 40


def test_a_large_one_is_not_overtaken_for_ever_by_small_ones() -> None:
    machine = Machine(blocks=8, size=4, step_tokens=8, running=4, window=None)
    small = {"max_new_tokens": 6, "ignore_eos": True}
    for start in range(4):
        machine.add(sequence_of([start] * 4, **small))
    large = sequence_of([9] * 25, max_new_tokens=6, ignore_eos=True)
    machine.add(large)
    for step in range(100):
        machine.add(sequence_of([step], **small))
        machine.step()
        if large.finish_reason:
            break
    assert step < 30


def test_equal_priorities_go_in_order_and_are_not_disturbed() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=16, running=3, window=None)
    sequences = [sequence_of([start, 1, 2], max_new_tokens=5, ignore_eos=True) for start in range(9)]
    ends: list[int] = []
    for sequence in sequences:
        machine.add(sequence)
    while machine.step():
        ends += [i for i, sequence in enumerate(sequences) if sequence.finish_reason and i not in ends]
    assert ends == [*range(9)]
    assert machine.scheduler.preemptions == 0


def test_a_higher_priority_takes_a_place_and_the_other_resumes() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=16, running=1, window=None)
    slow = sequence_of([1] * 9, max_new_tokens=12, ignore_eos=True)
    machine.add(slow)
    for _ in range(7):
        machine.step()
    urgent = sequence_of([2] * 9, max_new_tokens=3, ignore_eos=True, priority=1)
    rows = served(machine, urgent)
    assert machine.scheduler.preemptions == 1
    # Of the other's 16 tokens 15 were computed, and the 12 in full blocks are found.
    assert rows == [9, 1, 1, 4, 1, 1, 1, 1]
    assert slow.tokens == alone(sequence_of([1] * 9, max_new_tokens=12, ignore_eos=True), None)


def test_memory_goes_to_the_smaller_rank_and_the_larger_gives_way_once() -> None:
    machine = Machine(blocks=10, size=4, step_tokens=64, running=2, window=None)
    first, second = (sequence_of([n] * 15, max_new_tokens=20, ignore_eos=True) for n in (1, 2))
    machine.add(first)
    machine.add(second)
    while not first.finish_reason:
        machine.step()
    assert machine.scheduler.preemptions == 1  # no to and fro while the first still grows
    assert len(first.tokens) == 20
    served(machine)
    assert second.tokens == alone(sequence_of([2] * 15, max_new_tokens=20, ignore_eos=True), None)


def test_the_largest_rank_gives_way() -> None:
    machine = Machine(blocks=9, size=4, step_tokens=64, running=3, window=None)
    sequences = [sequence_of([n] * 8, max_new_tokens=9, ignore_eos=True) for n in (1, 2, 3)]
    for sequence in sequences:
        machine.add(sequence)
    while machine.scheduler.preemptions == 0 and machine.step():
        pass
    assert [sequence.content is None for sequence in sequences] == [False, False, True]


def test_chunks_share_a_step_with_those_that_decode() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=10, running=4, window=None)
    machine.add(sequence_of([1, 2], max_new_tokens=6, ignore_eos=True))
    machine.step()
    rows = served(machine, sequence_of([*range(25)], max_new_tokens=3, ignore_eos=True))
    assert rows == [10, 10, 8, 2, 2]


def test_a_beginning_is_computed_once() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=100, running=9, window=None)
    prompt = [*range(1, 15)]
    assert served(machine, sequence_of(prompt, max_new_tokens=1)) == [14]
    # Twelve positions are in full blocks; the last two tokens are computed.
    assert served(machine, sequence_of(prompt, max_new_tokens=1)) == [2]
    assert served(machine, sequence_of(prompt[:12], max_new_tokens=1)) == [4]
    assert served(machine, sequence_of(prompt, max_new_tokens=1, salt=1)) == [14]
    assert served(machine, sequence_of(prompt, max_new_tokens=1, prompt_logprobs=0)) == [14]
    machine.pool.forget()
    assert served(machine, sequence_of(prompt, max_new_tokens=1)) == [14]
    private = Machine(blocks=100, size=4, step_tokens=100, running=9, window=None, sharing=False)
    assert [served(private, sequence_of(prompt, max_new_tokens=1)) for _ in range(2)] == [[14], [14]]


def test_a_sibling_shares_what_is_computed_while_the_first_still_runs() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=100, running=9, window=None)
    first, second = (sequence_of([*range(1, 15)], max_new_tokens=9, ignore_eos=True) for _ in range(2))
    machine.add(first)
    machine.step()
    machine.add(second)
    machine.step()
    assert machine.rows == 14 + 1 + 2
    assert first.blocks[:3] == second.blocks[:3]
    assert first.blocks[3] != second.blocks[3]


def test_those_who_compute_the_same_at_once_keep_it_once() -> None:
    machine = Machine(blocks=100, size=4, step_tokens=100, running=9, window=None)
    for _ in range(3):
        machine.add(sequence_of([*range(1, 15)], max_new_tokens=9, ignore_eos=True))
    machine.step()
    assert machine.rows == 3 * 14
    assert machine.pool.used == 3 + 3


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9])
def test_what_is_behind_the_window_is_given_back(window: int) -> None:
    machine = Machine(blocks=12, size=4, step_tokens=8, running=1, window=window)
    sequence = sequence_of([1] * 70, max_new_tokens=60, ignore_eos=True)
    machine.add(sequence)
    while machine.alive:
        machine.step()
        held = {block for block in sequence.blocks if block is not None}
        assert machine.pool.used == len(held)
        # As many blocks as the next position and the window before it touch.
        assert len(held) <= (window + 4 - 2) // 4 + 1
    assert len(sequence.tokens) == 60


def test_with_a_window_a_beginning_is_found_by_its_end() -> None:
    machine = Machine(blocks=6, size=4, step_tokens=8, running=1, window=5)
    prompt = [1] * 41
    assert sum(served(machine, sequence_of(prompt, max_new_tokens=1))) == 41
    assert served(machine, sequence_of([*prompt, 2, 2], max_new_tokens=1)) == [3]  # its first blocks are gone


def test_sliding_begins_anew_in_its_old_place() -> None:
    machine = Machine(blocks=4, size=4, step_tokens=16, running=1, window=None)
    wanted = {"max_new_tokens": 20, "ignore_eos": True, "overflow": "slide"}
    prompt = [*range(3, 17)]
    sequence = sequence_of(prompt, 16, **wanted)
    rows = served(machine, sequence, sequence_of([2], 16, max_new_tokens=1))
    assert rows == [14, 1, 1, 9, *[1] * 7, 9, *[1] * 7, 9, 1]
    assert sequence.tokens == alone(sequence_of(prompt, 16, **wanted), None)
    assert machine.scheduler.preemptions == 0


def test_beginnings_outlive_ends() -> None:
    machine = Machine(blocks=4, size=4, step_tokens=100, running=1, window=None)
    prompt = [*range(1, 15)]
    assert served(machine, sequence_of(prompt, max_new_tokens=1)) == [14]
    served(machine, sequence_of([20] * 7, max_new_tokens=1))  # takes the empty block and one of the three
    assert served(machine, sequence_of(prompt, max_new_tokens=1)) == [14 - 8]


def test_one_that_slides_before_its_step_is_done_publishes_nothing_of_it() -> None:
    machine = Machine(blocks=9, size=4, step_tokens=8, running=1, window=None)
    sequence = sequence_of([*range(1, 8)], 8, max_new_tokens=9, overflow="slide", ignore_eos=True)
    machine.add(sequence)
    machine.step()
    parts = machine.plan()
    tokens = machine.compute(parts)
    machine.advance(tokens)
    machine.scheduler.done(parts)
    assert sequence.slid
    assert sequence.content.depth == 1  # what the second block holds was computed from other ids


def test_one_that_could_never_fit_is_refused_in_one_line() -> None:
    machine = Machine(blocks=3, size=64, step_tokens=8, running=1, window=None)
    machine.add(sequence_of([1] * 100, max_new_tokens=92))
    with pytest.raises(ResourceError) as caught:
        machine.scheduler.add(sequence_of([1] * 100, max_new_tokens=93))
    message = str(caught.value)
    assert "room for 192 positions" in message
    assert "may need 256, with a prompt of 100 tokens and an answer of up to 93" in message
    assert machine.scheduler.waiting == 1
    # A window forgets, and so has room for any length.
    windowed = Machine(blocks=3, size=64, step_tokens=200, running=1, window=66)
    served(windowed, sequence_of([1] * 400, max_new_tokens=93))
    with pytest.raises(ResourceError):
        Machine(blocks=2, size=64, step_tokens=200, running=1, window=67).add(sequence_of([1] * 400))


def test_finishing_twice_or_a_stranger_does_no_harm() -> None:
    machine = Machine(blocks=9, size=4, step_tokens=8, running=1, window=None)
    running, waiting = (sequence_of([n] * 6, max_new_tokens=9) for n in (1, 2))
    for sequence in (running, waiting):
        machine.add(sequence)
    machine.step()
    assert (machine.scheduler.running, machine.scheduler.waiting, machine.pool.used) == (1, 1, 2)
    for sequence in (waiting, waiting, sequence_of([3]), running, running):
        machine.scheduler.finish(sequence)
    assert (machine.scheduler.running, machine.scheduler.waiting, machine.pool.used) == (0, 0, 0)
    assert machine.scheduler.plan() == []


@pytest.mark.parametrize("name", ["sequence", "blocks", "scheduler"])
def test_plain_python_without_torch(name: str) -> None:
    outside = {module.split(".")[0] for module in loaded_by(f"puna.engine.{name}")} - {"puna"}
    assert outside <= sys.stdlib_module_names


def loaded_by(module: str) -> set[str]:
    """All that a module imports when it is loaded, and what those of this package import in turn."""
    found, unread = set(), [module]
    while unread:
        source = Path(importlib.util.find_spec(unread.pop()).origin).read_text(encoding="utf-8")
        new = set(imports(ast.parse(source))) - found
        found |= new
        unread += [name for name in new if name.startswith("puna.")]
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            yield node.module
        else:
            yield from imports(node)
