"""Blocks of cache memory: who holds them, what they contain, and finding those that begin a new prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items


class Content:
    """What a full block holds: keys and values of `tokens`, which follow all that `parent` stands for.

    Equal beginnings are one object, so that comparing is exact; its address says nothing about tokens, so no
    two can collide as hashes do. It lives as long as something uses it: the block that holds it, contents
    that follow it, sequences that will go on from it.
    """

    __slots__ = ("block", "depth", "following", "parent", "tokens", "uses")

    def __init__(self, parent: Content | None, tokens: tuple[int, ...]) -> None:
        """The beginning of all that is equally salted has neither parent nor tokens."""
        self.parent, self.tokens = parent, tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.following: dict[tuple[int, ...], Content] = {}
        self.block: int | None = None
        self.uses = 0


class BlockPool:
    """`count` blocks of `size` positions, each held by any number of sequences.

    A block that nobody holds any more, and whose content is known, is kept and can be found until its memory
    is needed: those dropped first go first. Who drops a sequence's last block first keeps its beginning
    longest.
    """

    def __init__(self, count: int, size: int, sharing: bool = True) -> None:
        """Without `sharing` no content is remembered."""
        self.count, self.size, self.sharing = count, size, sharing
        self._holders = [0] * count
        self._contents: list[Content | None] = [None] * count
        self._empty = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently dropped first
        self._beginnings: dict[int | None, Content] = {}  # by salt

    @property
    def free(self) -> int:
        """How many blocks can be taken now, those included that are kept."""
        return len(self._empty) + len(self._kept)

    @property
    def used(self) -> int:
        """How many blocks are held."""
        return self.count - self.free

    def take(self) -> int | None:
        """A block of one's own, with nothing known in it; None where all are held."""
        if self._empty:
            block = self._empty.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._erase(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more of a block that is held or kept."""
        if self._holders[block] == 0:
            del self._kept[block]
        self._holders[block] += 1

    def drop(self, block: int) -> None:
        """One holder less."""
        assert self._holders[block] > 0, f"block {block} is dropped by one who does not hold it"
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if self._contents[block] is None:
            self._empty.append(block)
        else:
            self._kept[block] = None

    def match(
        self, salt: int | None, ids: Items[int], window: int | None = None
    ) -> tuple[list[int | None], Content]:
        """Hold the longest known beginning of ids, never all of them: its blocks, and what they end in.

        At least one token is left to compute, since somebody waits for what follows it. With a `window`, the
        blocks that no later position will see are not needed and given as None. The content is used until
        `release` or `publish`.
        """
        beginning = self._beginnings.setdefault(salt, Content(None, ()))
        known = self._known(beginning, ids)
        length = self._usable(known, window)
        first = first_needed(length * self.size, window) // self.size
        blocks: list[int | None] = [None] * first
        for content in known[first:length]:
            assert content.block is not None
            self.hold(content.block)
            blocks.append(content.block)
        last = known[length - 1] if length else beginning
        last.uses += 1
        return blocks, last

    def publish(self, block: int, after: Content, tokens: tuple[int, ...]) -> Content:
        """Make a full block known under its tokens, after those of `after`, whose use passes to the result.

        Where another block holds the same already, that one is held in its stead: see the result's `block`.
        """
        content = after.following.get(tokens)
        if content is None:
            content = after.following[tokens] = Content(after, tokens)
            after.uses += 1
        if content.block is None:
            content.block, self._contents[block] = block, content
            content.uses += 1
        else:
            self.hold(content.block)
            self.drop(block)
        content.uses += 1
        self.release(after)
        return content

    def release(self, content: Content) -> None:
        """One use less; what nothing uses is forgotten, and so may be what it followed."""
        content.uses -= 1
        while content.uses == 0 and content.parent is not None:
            parent = content.parent
            del parent.following[content.tokens]
            parent.uses -= 1
            content = parent

    def forget(self) -> None:
        """Find nothing any more that has been published: the weights have changed.

        Blocks that are held stay held. What their sequences publish from now on is not found either, since it
        follows what was forgotten.
        """
        self._beginnings = {}
        for block in range(self.count):
            if self._contents[block] is not None:
                self._erase(block)
        self._empty += reversed(self._kept)
        self._kept.clear()

    def _known(self, beginning: Content, ids: Items[int]) -> list[Content]:
        """The contents that ids begin with, one token at least left out."""
        size, known, content = self.size, [], beginning
        for start in range(0, len(ids) - size, size):
            following = content.following.get(tuple(ids[start : start + size]))
            if following is None:
                break
            known.append(following)
            content = following
        return known

    def _usable(self, known: list[Content], window: int | None) -> int:
        """How many of the contents: as many as have blocks wherever later positions look."""
        usable = present = 0  # present: how many contents in a row have blocks, up to this one
        for length, content in enumerate(known, 1):
            present = present + 1 if content.block is not None else 0
            if length - present <= first_needed(length * self.size, window) // self.size:
                usable = length
        return usable

    def _erase(self, block: int) -> None:
        content = self._contents[block]
        assert content is not None
        self._contents[block] = content.block = None
        self.release(content)


def first_needed(position: int, window: int | None) -> int:
    """The smallest position that the token at `position`, or a later one, sees."""
    return 0 if window is None else max(0, position - window + 1)
