"""A request, and its answer in the making."""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine.params import SamplingParams
from puna.engine.sequence import Sequence
from puna.engine.state import SamplingState


@dataclass(frozen=True)
class Request:
    """What an engine is asked for.

    `prompt` are ids of the model's vocabulary. `continues`: the answer's text goes on from the prompt's;
    otherwise it reads by itself. `anchor` is how many leading ids stay when the context overflows.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    end_ids: tuple[int, ...] = ()
    continues: bool = True
    anchor: int = 0


class Track:
    """One of an answer's sequences, how it is sampled, and its text, piece by piece."""

    def __init__(self, sequence: Sequence, state: SamplingState, answer: Answer) -> None:
        self.sequence, self.state, self.answer = sequence, state, answer
        self.pieces: list[str] = []


class Answer:
    """A request on its way through an engine: one sequence, or as many as `n` and `best_of` ask for."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tracks: list[Track] = []
        self.error: BaseException | None = None
        """Why it could not be answered; its sequences are given up."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: each sequence has ended, or it failed."""
        return self.error is not None or all(track.sequence.finish_reason for track in self.tracks)

    @property
    def chosen(self) -> list[Track]:
        """The `n` tracks to give back: the best of them where more were made, by mean log-probability."""
        params = self.request.params
        if params.answers == params.n:
            return self.tracks
        return sorted(self.tracks, key=lambda track: -track.state.score)[: params.n]
