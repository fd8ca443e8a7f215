"""BPE merges from a vocabulary that only says in which order its tokens were made.

SentencePiece and tiktoken join the two neighbours whose union comes first in the vocabulary, and the
leftmost such pair where several do. A list of merges, as tokenizer.json has it, says the same when it
names every way to split every token, the tokens in order.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def merges(tokens: Iterable[Text], vocabulary: Container[Text]) -> Iterator[tuple[Text, Text]]:
    """Every pair from the vocabulary that joins to one of `tokens`, in the tokens' order.

    Pairs of one token compete only in periodic text ("aaa" as a+aa or aa+a). There, what stands left has
    merged first and is the longer, so the pair with the longer left part comes first.

    >>> list(merges(["ab", "abc"], {"a", "b", "c", "ab", "abc"}))
    [('a', 'b'), ('ab', 'c')]
    """
    for token in tokens:
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                yield left, right


def by_token(pairs: Iterable[tuple[Text, Text]]) -> list[frozenset[tuple[Text, Text]]]:
    """A list of merges as one set for each token, in order: two lists that agree in it give the same ids.

    Published files order the pairs of one token by their ids. That order decides nothing: two pairs of one
    token never compete, since what stands left has merged first.

    >>> by_token([("a", "b"), ("ab", "c"), ("a", "bc")]) == by_token([("a", "b"), ("a", "bc"), ("ab", "c")])
    True
    """
    return [frozenset(group) for _, group in groupby(pairs, key=lambda pair: pair[0] + pair[1])]
