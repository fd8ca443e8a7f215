"""Documents → tokens, on several threads, in the order they come.

Threads do the work: the tokenizer libraries leave Python's lock alone while they encode, threads are safe
beside torch on every system, and scripts need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from puna.data.holdout import Side
from puna.data.readers import Document
from puna.data.shardfile import TokenDocument
from puna.tokenizer.tokenizer import Tokenizer

TASK_BYTES = 1 << 18  # of text that a thread takes at once: small enough to share out, large enough to pay

Entry = tuple[Side, Document]


def encode_all(
    entries: Iterable[Entry], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Side, TokenDocument]]:
    """Each document as BOS, its text and EOS; a bounded number of tasks is read ahead.

    Raises:
        TokenizerError: the tokenizer cannot take a text.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    waiting: deque[tuple[list[Side], Future[list[TokenDocument]]]] = deque()
    try:
        for task in _tasks(entries):
            sides = [side for side, _ in task]
            waiting.append((sides, pool.submit(_encode, tokenizer, [document for _, document in task])))
            if len(waiting) > 2 * workers:
                yield from _finish(*waiting.popleft())
        while waiting:
            yield from _finish(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    task: list[Entry] = []
    size = 0
    for entry in entries:
        task.append(entry)
        size += len(entry[1].text)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _finish(
    sides: Sequence[Side], future: Future[list[TokenDocument]]
) -> Iterator[tuple[Side, TokenDocument]]:
    return zip(sides, future.result(), strict=True)


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[TokenDocument]:
    texts = [document.text for document in documents]
    rows = tokenizer.encode_batch(texts, bos=True, eos=tokenizer.eos_id is not None, threads=1)
    return [
        TokenDocument(np.array(ids, dtype=np.uint32), len(document.encoded()), document.source)
        for ids, document in zip(rows, documents, strict=True)
    ]
