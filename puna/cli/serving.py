"""The command that serves a model over HTTP: serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.cli.options import Model, Opening, Overrides, Template, given, opens_a_model
from puna.cli.printing import note
from puna.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from puna.engine.llm import LLM


@opens_a_model
def serve(
    model: Model,
    overrides: Overrides = None,
    settings: Annotated[
        Path | None, typer.Option(help="A TOML file of settings.", show_default=False)
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 127.0.0.1 without it.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 without it; 0 takes any free one.")] = None,
    template: Template = None,
    opening: Opening = Opening(),
) -> None:
    """Serve a model: OpenAI's API, a page to talk to it, a live view at /status, metrics.

    Settings are given as key=value, such as api_keys=keys.txt, requests_per_minute=60 or
    engine.max_running=32; docs/serving.md has them all. SIGTERM and Ctrl-C let what runs end first.
    """
    from puna.serve.settings import ServeSettings
    from puna.settings import overridden, read_settings

    try:
        from puna.serve.server import serve as run
    except ModuleNotFoundError as missing:
        raise MissingExtraError(missing.name or "fastapi", "serve") from None
    options = given(host=host, port=port, template=template)
    given_twice = overridden({}, overrides or ())
    for name, value in options.items():
        if given_twice.get(name, value) != value:
            raise SettingsError(f"--{name} and {name}= say different things; leave one of them out")
    changes = [*(overrides or ()), *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    chosen = read_settings(ServeSettings, settings, changes)

    def opened(say: Callable[[str], None]) -> LLM:
        return opening.llm(model, say, chosen.engine)

    run(opened, model, chosen, note)
