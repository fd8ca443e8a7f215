"""What a newcomer meets at the start: names, templates, settings in words that people write, what runs."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from puna.cli.app import app
from puna.devices import total_memory
from puna.engine.cache import bytes_per_position
from puna.engine.llm import LLM
from puna.engine.loading import load
from puna.errors import InputError, ModelError, SettingsError
from puna.kernels.pages import BLOCK
from puna.serve.facts import described, model_facts
from puna.serve.metrics import Metrics
from puna.serve.names import model_names
from puna.serve.server import serve
from puna.serve.settings import ServeSettings
from puna.serve.templates import check_template, template_text
from puna.settings import parse, read_settings
from tests.serve.running import running, state_of


def failing_start(llm: LLM, **settings: Any) -> tuple[str, list[str], InputError]:
    """Standard error, what was said, and the error of a server that must not start."""
    said: list[str] = []
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(InputError) as caught:
        serve(lambda say: llm, "tiny", parse(ServeSettings, {"port": 0, **settings}), said.append)
    return stderr.getvalue(), said, caught.value


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("nope", "'nope' is no chat template and no file; expected one of llama2"),
        ("chatlm", "Did you mean 'chatml'?"),
        ("{% for %}", "fails on a message of a user: the chat template is malformed"),
        ("{{ nothing.of.it }}", "fails on a message of a user"),
        ("{{ raise_exception('tools only') }}", "tools only"),
        ("llama3", "needs the token '<|start_header_id|>'"),
    ],
)
def test_a_template_that_fails_is_refused_before_anybody_asks(llm: LLM, template: str, says: str) -> None:
    stderr, _, error = failing_start(llm, template=template, log_format="text")
    assert says in str(error) and str(error).startswith("template: ") and error.exit_code == 2
    assert "\n" not in str(error) and stderr == "" and not error.told


def test_a_template_may_stand_in_a_file(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}!")
    assert template_text(str(file)) == "{{ messages[0].content }}!"
    assert [template_text(name) for name in ("chatml", "{{ x }}", None)] == ["chatml", "{{ x }}", None]
    file.write_text("hello")
    with pytest.raises(SettingsError, match="holds no chat template"):
        template_text(str(file))
    file.write_bytes(b"\xff{{")
    with pytest.raises(SettingsError, match="is no text"):
        template_text(str(file))
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        template_text(str(tmp_path))
    for too_long in ("x" * 5000, "x\0y"):
        with pytest.raises(SettingsError, match="cannot be read"):
            template_text(too_long)


def test_a_models_own_template_that_fails_is_a_note(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_template(llm, None) is None and check_template(llm, "plain") is None
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ nothing.of.it }}")
    assert "the model's own chat template fails" in (check_template(llm, None) or "")
    assert check_template(llm, "plain") is None


def test_with_json_a_failing_start_is_json_too(llm: LLM) -> None:
    stderr, said, error = failing_start(llm, template="{% for %}", log_format="json")
    (line,) = map(json.loads, stderr.splitlines())
    assert line["event"] == "server" and line["level"] == "error" and line["message"] == str(error)
    assert error.told and said == []


def test_with_json_warnings_are_json_too(llm: LLM) -> None:
    stderr = io.StringIO()

    def opened(say: Callable[[str], None]) -> LLM:
        say("note: it is old")
        warnings.warn("it is slow", UserWarning, stacklevel=1)
        raise ModelError("it is none")

    settings = parse(ServeSettings, {"port": 0, "log_format": "json"})
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings(), pytest.raises(ModelError):
        warnings.simplefilter("always")
        serve(opened, "tiny", settings, print)
    first, second, third = (json.loads(line)["message"] for line in stderr.getvalue().splitlines())
    assert (first, third) == ("note: it is old", "it is none") and "UserWarning: it is slow" in second


@pytest.mark.parametrize(
    ("given", "identity", "others"),
    [
        ("runs/demo", "demo", {"runs/demo/"}),
        ("runs/demo/model/", "demo", {"runs/demo/model"}),
        ("tiny.gguf", "tiny", {"tiny.gguf"}),
        ("./tiny.gguf", "tiny", {"tiny.gguf", "./tiny.gguf"}),
        ("runs/v1.5", "v1.5", {"runs/v1.5"}),
        ("runs/demo/model.pt", "demo", {"model.pt"}),
        (".", "here", {".", "./"}),
        ("linked", "linked", set()),
        ("org/some-7B", "some-7B", {"org/some-7B"}),
    ],
)
def test_models_are_called_by_what_people_call_them(
    given: str, identity: str, others: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for directory in ("runs/demo/model", "runs/v1.5"):
        (here / directory).mkdir(parents=True)
    for file in ("tiny.gguf", "runs/demo/model.pt"):
        (here / file).touch()
    (here / "linked").symlink_to("runs/v1.5")
    monkeypatch.chdir(here)
    name, names = model_names(given)
    assert name == identity and {given, identity} | others <= names and "" not in names
    chosen, names = model_names(given, "mine")
    assert chosen == "mine" and {"mine", given} <= names


def test_what_runs_is_told_and_shown(llm: LLM, tmp_path: Path) -> None:
    state = state_of(llm, parse(ServeSettings, {}))
    facts = model_facts(state)
    blocks = llm.engine.load.blocks
    each = bytes_per_position(llm.config, llm.dtype)
    assert facts["cache_positions"] == blocks * BLOCK and facts["cache_bytes"] == blocks * BLOCK * each
    assert (facts["dtype"], facts["device"], facts["context"]) == ("float32", "cpu", 512)
    first, second = described(state, 0)
    assert first.startswith("tiny: float32 on cpu, ") and "context 512" in first
    assert first.endswith("chat template: plain, since the model has none")
    assert f"{blocks * BLOCK:,} positions" in second and second.endswith(
        "up to 64 answers at once, no API keys"
    )
    assert described(state_of(llm, parse(ServeSettings, {"template": "{{ x }}"})), 1)[1].endswith(
        ", 1 API key"
    )
    with running(llm, Metrics(llm.engine)) as server:
        live = server.get("/status", headers={"accept": "application/json"}).json()
    assert live["model_facts"] == facts


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["cors_origins=https://x.org"], {"cors_origins": ["https://x.org"]}),
        (["cors_origins=https://x.org, https://y.org"], {"cors_origins": ["https://x.org", "https://y.org"]}),
        (['allowed_hosts=["a.org","*.b.org"]'], {"allowed_hosts": ["a.org", "*.b.org"]}),
        (["allowed_hosts=*"], {"allowed_hosts": ["*"]}),
        (["allowed_hosts=::1"], {"allowed_hosts": ["::1"]}),
        (["max_body_bytes=2MB"], {"max_body_bytes": 2_000_000}),
        (["max_body_bytes=1.5 MiB"], {"max_body_bytes": 3 << 19}),
        (["max_body_bytes=4096b"], {"max_body_bytes": 4096}),
        (["max_body_bytes=4096"], {"max_body_bytes": 4096}),
    ],
)
def test_settings_as_people_write_them(changes: list[str], expected: dict[str, Any]) -> None:
    settings = read_settings(ServeSettings, None, changes)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["allowed_hosts=https://x.org/y"], "got 'https://x.org/y'; write x.org"),
        (["allowed_hosts=x.org:443"], "without scheme, port and path, got 'x.org:443'; write x.org"),
        (["max_body_bytes=2XB"], "expected bytes as a number, or such as 2GB or 512MiB, got '2XB'"),
        (["max_body_bytes=1B"], "greater than or equal to 1024"),
        (["engine.cache_memory=0GB"], "greater than 0"),
        (["engine=5"], "is a group of settings, got 5; give one of them: engine.cache_memory, "),
        (["dtype=float16"], "'dtype' is an option of the command, no setting; give --dtype VALUE"),
        (["cache_dir=x"], "give --cache-dir VALUE"),
    ],
)
def test_settings_that_are_none_say_what_to_write(changes: list[str], says: str) -> None:
    with pytest.raises(SettingsError) as fault:
        read_settings(ServeSettings, None, changes)
    assert says in str(fault.value)


def test_more_memory_than_there_is_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    memory = total_memory(torch.device("cpu"))
    with pytest.raises(SettingsError, match=r"engine.cache_memory asks for .* in all; give less"):
        load(tmp_path / "none", device="cpu", engine={"cache_memory": memory + 1})
    with pytest.raises(InputError, match="none"):
        load(tmp_path / "none", device="cpu", engine={"cache_memory": memory})


def command(*arguments: str) -> str:
    """The error of a command that must not start."""
    result = CliRunner().invoke(app, ["serve", "tiny", *arguments])
    assert isinstance(result.exception, SettingsError), result.output
    return str(result.exception)


def test_an_option_and_a_setting_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--port and port= say different things" in command("--port", "7", "port=8")
    assert "--host and host= say different things" in command("--host", "::1", "host=x")
    started: list[int] = []

    def keep(opened: Any, model: str, settings: ServeSettings, say: Any) -> None:
        started.append(settings.port)

    monkeypatch.setattr("puna.serve.server.serve", keep)
    assert CliRunner().invoke(app, ["serve", "tiny", "--port", "7", "port=7"]).exit_code == 0
    assert started == [7]


def test_the_help_names_every_dtype() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    assert all(name in shown for name in ("float64", "float32", "bfloat16", "float16"))
