"""The chat template that a server is told to take: found, read from a file, tried before anybody asks."""

from __future__ import annotations

from pathlib import Path

from puna.engine.llm import LLM
from puna.errors import PunaError, SettingsError, nearest
from puna.tokenizer import chat

PROBE = ({"role": "user", "content": "x"},)


def template_text(template: str | None) -> str | None:
    """A template's name, or its text, which may stand in a file; None as it is.

    Raises:
        SettingsError: it is none of them, or the file cannot be read.
    """
    if template is None or template in chat.TEMPLATES or "{" in template:
        return template
    try:
        text = Path(template).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(
            f"template: {template!r} is no chat template and no file; expected one of "
            f"{', '.join(chat.TEMPLATES)}, a file of Jinja, or its text.{nearest(template, chat.TEMPLATES)}"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"template: {template} is no text; expected a chat template in Jinja") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"template: {template!r:.200} cannot be read: {reason}") from None
    if "{{" not in text and "{%" not in text:
        raise SettingsError(f"template: {template} holds no chat template; expected Jinja, with {{{{ or {{%")
    return text


def check_template(llm: LLM, template: str | None) -> str | None:
    """Try the template on the shortest conversation; what is to be said where the model's own fails.

    Raises:
        SettingsError: the template given fails.
    """
    if llm.tokenizer is None or (template is None and llm.tokenizer.chat_template is None):
        return None
    try:
        chat.render(llm.tokenizer, PROBE, template)
    except PunaError as error:
        if template is not None:
            raise SettingsError(f"template: it fails on a message of a user: {error}") from None
        return (
            f"the model's own chat template fails on a message of a user ({error}); template= takes another"
        )
    return None
