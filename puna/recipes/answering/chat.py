"""Hold a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.engine.llm import LLM
from puna.recipes.answering.commands import load, obey
from puna.recipes.answering.conversation import Conversation, Note
from puna.recipes.answering.terminal import Read, Write, read_message


def chat(
    llm: LLM,
    sampling: dict[str, Any],
    *,
    system: str | None,
    template: str | None,
    start: Path | None,
    read: Read,
    write: Write,
    note: Note,
    person: bool = False,
) -> int:
    """Answer what is typed, with everything said before, until /exit or the end of the input.

    `start` is a conversation that /save kept, to go on from; `system` takes the place of its system message.
    Only a `person` is told how to go about it.

    Returns:
        How many messages an error kept from being answered.

    Raises:
        InputError: the model has no chat template and none was named, or it refuses the start; there is too
            little memory.
        KeyboardInterrupt: Ctrl-C twice where a message is typed.
    """
    conversation = Conversation(llm, sampling, template, write, note)
    conversation.begin([])
    if start is not None:
        load(conversation, str(start))
    if system:
        conversation.begin([{"role": "system", "content": system}, *conversation.said])
    _ = llm.engine  # made here, so that too little memory is told before anyone types
    if person:
        note("[/help tells the commands; Ctrl-D ends]")
    while not conversation.ended and (message := _next(read, note)) is not None:
        if message.startswith("/"):
            obey(conversation, message)
        elif message.strip():
            conversation.ask(message)
    return conversation.failed


def _next(read: Read, note: Note) -> str | None:
    """The next message; Ctrl-C where nothing is typed is meant at its second in a row."""
    try:
        return read_message(read)
    except KeyboardInterrupt:
        note("\n[Ctrl-D or /exit ends; so does Ctrl-C once more]")
        return read_message(read)
