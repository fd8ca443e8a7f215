"""API keys: read strictly, compared without a hint, asked for on every route."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path

import pytest
from starlette.routing import Route

from puna.engine.llm import LLM
from puna.errors import SettingsError
from puna.serve import keys as module
from puna.serve.app import make_app
from puna.serve.guard import BASIC, OPEN
from puna.serve.keys import Allowance, Busy, Keys, presented, read_keys
from puna.serve.settings import ServeSettings
from puna.settings import parse
from tests.serve.guarding import JSON_HEADERS, Answer, ask, guard_of
from tests.serve.running import state_of

SECRET = "sk-0123456789abcdef"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return str(path)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path / "keys", f"# ours\n\n{SECRET}1\n  ann\t{SECRET}2  \n")
    keys, remarks = read_keys(file, {"PUNA_API_KEYS": f"{SECRET}3, ben {SECRET}4"})
    known = Keys(keys)
    names = [found.name for number in "1234" if (found := known.find(f"{SECRET}{number}".encode()))]
    assert names == ["key-1", "ann", "key-3", "ben"]
    assert known.find(SECRET.encode()) is None and known.find(b"") is None
    assert remarks == []
    assert read_keys(None, {}) == ([], [])


@pytest.mark.parametrize(("file", "environment"), [(None, {"PUNA_API_KEYS": " "}), ("", {})])
def test_a_place_for_keys_that_is_empty_does_not_open_the_server(
    file: str | None, environment: dict[str, str]
) -> None:
    with pytest.raises(SettingsError, match=r"empty; name a file|holds no key; give it one, or unset it"):
        read_keys(file, environment)


def test_comments_end_lines_of_a_file(tmp_path: Path) -> None:
    keys, _ = read_keys(
        written(tmp_path / "keys", f"{SECRET}#1 # hers\nann {SECRET}2\t#his\n#{SECRET}\n"), {}
    )
    known = Keys(keys)
    assert len(keys) == 2 and known.find(f"{SECRET}#1".encode()) and known.find(f"{SECRET}2".encode())


def test_nothing_kept_of_a_key_shows_it(tmp_path: Path) -> None:
    keys, _ = read_keys(None, {"PUNA_API_KEYS": f"ann {SECRET}"})
    assert SECRET not in repr(keys) and SECRET not in repr(vars(Keys(keys)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        (f"ann the first {SECRET}", "line 1: expected a key"),
        (f"{SECRET}\nä{SECRET}\n", "line 2: expected a key"),
        (f"{SECRET}\nann {SECRET}\n", "line 2: the same key as that of"),
    ],
)
def test_a_file_at_fault_is_one_line_without_a_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as fault:
        read_keys(written(tmp_path / "keys", text), {})
    assert says in str(fault.value) and SECRET not in str(fault.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(str(tmp_path / "none"), {})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="no text"):
        read_keys(str(tmp_path / "bytes"), {})
    with pytest.raises(SettingsError, match="PUNA_API_KEYS, part 2"):
        read_keys(None, {"PUNA_API_KEYS": f"{SECRET},,"})


def test_what_makes_keys_weak_is_told(tmp_path: Path) -> None:
    file = Path(written(tmp_path / "keys", "ann short\n"))
    file.chmod(0o644)
    _, remarks = read_keys(str(file), {})
    assert len(remarks) == 2
    assert "every user of this machine may read it" in remarks[0]
    assert "fewer than 16 characters" in remarks[1] and "ann" in remarks[1]
    assert "short" not in " ".join(remarks)


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return original(one, other)

    original = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    known = Keys(read_keys(None, {"PUNA_API_KEYS": ",".join(f"{SECRET}{n}" for n in range(5))})[0])
    for given in (f"{SECRET}0", f"{SECRET}4", "wrong", ""):
        compared.clear()
        known.find(given.encode())
        assert len(compared) == 5
        assert {len(side) for pair in compared for side in pair} == {32}  # no length shows either


def test_how_a_key_is_presented() -> None:
    def given(*values: str, basic: bool = False) -> bytes | None:
        return presented([(b"authorization", value.encode()) for value in values], basic)

    password = base64.b64encode(b"anyone:se:cret").decode()
    assert given("Bearer abc") == b"abc" and given("bEARER   abc ") == b"abc"
    assert given() is None and given("abc") is None and given("Token abc") is None
    assert given("Bearer abc", "Bearer abc") is None
    assert given(f"Basic {password}") is None
    assert given(f"Basic {password}", basic=True) == b"se:cret"
    assert given("Basic ///", basic=True) is None and given("Basic YWJj", basic=True) is None


def test_the_minute_slides() -> None:
    allowance = Allowance(per_minute=2, at_once=None)
    allowance.take(100.0)
    allowance.take(130.0)
    with pytest.raises(Busy) as busy:
        allowance.take(159.5)
    assert busy.value.retry_after == 1
    allowance.take(160.0)  # the first was a minute ago
    with pytest.raises(Busy) as busy:
        allowance.take(161.0)
    assert busy.value.retry_after == 29
    for second in range(190, 4000, 31):
        allowance.take(second)
    assert len(allowance._taken) <= 2


def test_every_route_asks_for_a_key_but_three(llm: LLM) -> None:
    app = make_app(state_of(llm, parse(ServeSettings, {})))
    guard = guard_of(app, keys=[f"ann {SECRET}"])
    paths = {route.path for route in app.routes if isinstance(route, Route)} | {"/no/such/path"}
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/metrics", "/openapi.json"} <= paths
    assert set(OPEN) == {"/", "/health", "/ready"} and set(BASIC) == {"/status"}
    for path in sorted(paths - OPEN):
        for method in METHODS:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Token {SECRET}"}):
                answer = ask(guard, method, path.replace("{id:path}", "x"), {**JSON_HEADERS, **header}, b"{}")
                assert_refused(answer, f"{method} {path}")
    for path in OPEN:
        assert ask(guard, path=path).status == 200, path


def test_a_key_opens_every_route(llm: LLM) -> None:
    app = make_app(state_of(llm, parse(ServeSettings, {})))
    guard = guard_of(app, keys=[f"ann {SECRET}"])
    bearer = {"authorization": f"Bearer {SECRET}"}
    for path in ("/status", "/metrics", "/v1/models", "/openapi.json"):
        answer = ask(guard, path=path, headers=bearer)
        assert answer.status == 200 and answer.record.key == "ann", path
    answer = ask(guard, "POST", "/tokenize", {**JSON_HEADERS, **bearer}, b'{"content": "def"}')
    assert answer.status == 200


def test_paths_that_only_look_open_are_not() -> None:
    guard = guard_of(keys=[SECRET])
    for path in ("//", "/health/", "/./health", "/health/../v1/models", "/%68ealth", "/HEALTH", "/v1/models"):
        assert_refused(ask(guard, path=path), path)


def test_a_browser_may_send_the_key_as_a_password_to_the_live_view_alone() -> None:
    guard = guard_of(keys=[SECRET])
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()}
    assert ask(guard, path="/status", headers=basic).status == 200
    for path in ("/metrics", "/v1/models"):
        assert_refused(ask(guard, path=path, headers=basic), path)
    wrong = {"authorization": "Basic " + base64.b64encode(b"me:wrong").decode()}
    asked = ask(guard, path="/status", headers=wrong)
    assert asked.status == 401 and asked.headers["www-authenticate"].startswith("Basic")


def test_a_key_cannot_come_otherwise() -> None:
    guard = guard_of(keys=[SECRET])
    for header in ({"x-api-key": SECRET}, {"cookie": f"key={SECRET}"}, {"api-key": SECRET}):
        assert_refused(ask(guard, path="/v1/models", headers=header), str(header))


def assert_refused(answer: Answer, what: str) -> None:
    assert answer.status == 401, what
    assert answer.error["code"] == "invalid_api_key"
    assert "www-authenticate" in answer.headers and "x-request-id" in answer.headers
    assert SECRET.encode() not in answer.body


def test_one_of_something_is_said_as_one() -> None:
    for limits in ((1, None), (None, 1)):
        allowance = Allowance(*limits)
        allowance.take(10.0)
        with pytest.raises(Busy, match=r"^1 request .* is allowed; try again"):
            allowance.take(69.5)
    allowance = Allowance(1, None)
    allowance.take(10.0)
    with pytest.raises(Busy, match=r"try again in 1 second$"):
        allowance.take(69.5)
