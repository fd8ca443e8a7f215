"""An answer's text as it is made."""

from __future__ import annotations

from collections.abc import Iterator

from puna.engine.answer import Answer
from puna.engine.completion import Completion, completion
from puna.engine.engine import Engine
from puna.engine.sequence import FinishReason


class Stream(Iterator[str]):
    """Pieces of text, each as soon as it is certain; nothing is computed before one is asked for.

    A stream that is closed, or that nobody holds any more, is no longer computed.
    """

    def __init__(self, engine: Engine, answer: Answer) -> None:
        """`answer` is of one sequence."""
        self._engine, self._answer = engine, answer
        self._given, self._stopped = 0, False

    def __next__(self) -> str:
        """The next piece, never empty.

        Raises:
            Exception: what ended the answer, where something did.
        """
        (track,) = self._answer.tracks
        while self._given == len(track.pieces) and not self._answer.finished and not self._stopped:
            self._engine.step()
        if self._answer.error is not None:
            raise self._answer.error
        if self._given == len(track.pieces):
            raise StopIteration
        self._given += 1
        return track.pieces[self._given - 1]

    def completion(self) -> Completion:
        """The whole answer, as `generate` gives it; what is not computed yet is given up.

        Raises:
            Exception: what ended the answer, where something did.
        """
        self.close()
        return completion(self._answer)

    @property
    def tokens(self) -> int:
        """How many the model has produced so far."""
        return len(self._answer.tracks[0].sequence.tokens)

    @property
    def prompt_tokens(self) -> int:
        """How many the answer follows."""
        return len(self._answer.tracks[0].sequence.prompt)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it has not."""
        return self._answer.tracks[0].sequence.finish_reason

    def stop(self) -> None:
        """Let it end after the step at hand: unlike `close`, this may be called in the middle of one."""
        self._stopped = True

    def close(self) -> None:
        """Give up what is not computed yet."""
        self._engine.cancel(self._answer)

    def __del__(self) -> None:
        self.close()
