"""What a user types after a slash in a conversation: one row for each command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puna.engine.params import SamplingParams
from puna.errors import DataError, InputError, PunaError, SettingsError, nearest
from puna.files import disk_errors, write_atomically
from puna.formats.json_files import read_object
from puna.recipes.answering.conversation import Conversation, Messages
from puna.recipes.answering.options import refuse_several
from puna.settings import overridden, parse

ROLES = ("system", "user", "assistant")
TYPING = (
    'A message of several lines begins with """ and ends with """; what is pasted at once is one message.\n'
    "Ctrl-C stops an answer; what was said of it stays. A space before a slash makes a message of a command."
)


@dataclass(frozen=True)
class Command:
    """How a command is written, what it does, and what does it: given the conversation and its argument."""

    usage: str
    help: str
    run: Callable[[Conversation, str], None]


def obey(conversation: Conversation, line: str) -> None:
    """Do what a line that begins with a slash says; what is wrong with it is told, and changes nothing."""
    name, argument = [*line[1:].split(None, 1), "", ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        near = nearest(f"/{name}", [f"/{known}" for known in COMMANDS])
        conversation.note(
            f"[no command /{name}.{near} /help lists them; a space before the slash makes it a message]"
        )
        return
    try:
        command.run(conversation, argument.strip())
    except PunaError as error:
        conversation.note(f"[{error}]")


def load_messages(path: Path) -> Messages:
    """The conversation in a file that /save wrote.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    messages = read_object(path).get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(
            f"{path} holds no conversation: expected {{'messages': [{{'role': …, 'content': …}}, …]}} with "
            f"the roles {', '.join(ROLES)}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
    )


def load(conversation: Conversation, argument: str) -> None:
    """Go on from the conversation in a file.

    Raises:
        InputError: there is none, or the template refuses it.
    """
    path = _path(argument, "/load")
    conversation.begin(load_messages(path))
    conversation.files.add(path.resolve())
    waits = bool(conversation.said) and conversation.said[-1]["role"] == "user"
    waiting = "; the last one waits for its answer: /retry" if waits else ""
    conversation.note(f"[{len(conversation.messages)} messages from {path}{waiting}]")


def _save(conversation: Conversation, argument: str) -> None:
    path = _path(argument, "/save")
    if path.exists() and path.resolve() not in conversation.files:
        raise DataError(f"{path} exists; choose another file")
    text = json.dumps({"messages": conversation.messages}, indent=2)  # in ASCII: half a surrogate pair fits
    with disk_errors(f"writing {path}", path, DataError, "make room, or choose another place"):
        write_atomically(path, text + "\n")
    conversation.files.add(path.resolve())
    conversation.note(f"[{len(conversation.messages)} messages in {path}]")


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InputError(f"name a file: {command} FILE")
    return Path(argument).expanduser()


def _help(conversation: Conversation, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    rows = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    conversation.note("\n".join([*rows, TYPING]))


def _system(conversation: Conversation, argument: str) -> None:
    system = [{"role": "system", "content": argument}] if argument else []
    conversation.begin([*system, *conversation.said])
    conversation.note(f"[{'a new' if system else 'no'} system message, from the next answer on]")


def _set(conversation: Conversation, argument: str) -> None:
    key, value = [*argument.split(None, 1), "", ""][:2]
    if not key:
        conversation.note(f"[{_settings(conversation)}]")
        return
    if key.partition("=")[0].partition(".")[0] == "engine":
        raise SettingsError("engine settings are chosen at the start: puna chat MODEL --set engine.KEY=VALUE")
    values = copy.deepcopy(conversation.sampling)
    if value or "=" in key:
        overridden(values, [f"{key}={value}" if value else key])
    else:
        values[key] = conversation.defaults.get(key)
        if values[key] is None and key in SamplingParams.model_fields:
            del values[key]
    refuse_several(parse(SamplingParams, values, "settings"))
    conversation.sampling = values
    conversation.note(f"[{_settings(conversation)}]")


def _settings(conversation: Conversation) -> str:
    """Every setting that differs from its default."""
    params = parse(SamplingParams, conversation.sampling, "settings")
    changed = [
        f"{key} {value!r}" for key, value in params if value != SamplingParams.model_fields[key].default
    ]
    return ", ".join(changed) or "all settings at their defaults"


def _temperature(conversation: Conversation, argument: str) -> None:
    _set(conversation, f"temperature {argument}" if argument else "")


def _reset(conversation: Conversation, argument: str) -> None:
    conversation.begin(conversation.system)
    conversation.note("[a new conversation]")


def _retry(conversation: Conversation, argument: str) -> None:
    if parse(SamplingParams, conversation.sampling, "settings").temperature == 0:
        conversation.note("[at temperature 0 the answer is the same again]")
    conversation.retry()


def _exit(conversation: Conversation, argument: str) -> None:
    conversation.ended = True


COMMANDS = {
    "help": Command("/help", "this", _help),
    "system": Command("/system TEXT", "set the system message; none without TEXT", _system),
    "temperature": Command("/temperature X", "set the temperature; 0 is greedy", _temperature),
    "set": Command(
        "/set KEY VALUE", "any sampling setting; without VALUE as it was at the start, alone shows all", _set
    ),
    "reset": Command("/reset", "forget what was said; the system message stays", _reset),
    "retry": Command("/retry", "answer the last message once more", _retry),
    "save": Command("/save FILE", "keep the conversation, as JSON", _save),
    "load": Command("/load FILE", "go on from a saved conversation", load),
    "exit": Command("/exit", "end; so does Ctrl-D", _exit),
}
