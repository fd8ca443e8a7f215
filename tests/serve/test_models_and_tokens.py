"""Everything that is no completion: models, tokens, health, figures, pages, and paths that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.serve.app import FAILURES
from puna.tokenizer.tokenizer import Tokenizer
from tests.serve.running import Running, running

HARD = ["", "Once upon a time", " leading and trailing ", "é😀\u200d漢字", "a\nb\tc", "<s></s>", "{{ x }}"]


def test_models(server: Running) -> None:
    entry = {
        "id": "tiny",
        "object": "model",
        "created": 1,
        "owned_by": "puna",
        "context": 512,
        "max_model_len": 512,
        "template": "plain",
    }
    assert server.get("/v1/models").json() == {"object": "list", "data": [entry]}
    assert server.get("/v1/models/tiny").json() == entry
    assert server.get("/v1/models/models/tiny").json() == entry  # the path it was given as
    for other in ("gpt-4", "tiny/", "", "a/b/c", "%2e%2e%2fetc%2fpasswd"):
        response = server.get(f"/v1/models/{other}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("text", HARD)
def test_text_becomes_ids_and_text_again(text: str, server: Running, tokenizer: Tokenizer) -> None:
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == tokenizer.encode(text, bos=False)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}


def test_special_tokens(story_server: Running, stories: LLM) -> None:
    tokenizer = stories.tokenizer
    assert tokenizer is not None

    def ids(**body: Any) -> Any:
        return story_server.post("/tokenize", body).json()["tokens"]

    assert ids(content="</s>") == tokenizer.encode("</s>", bos=False)
    assert ids(content="</s>", parse_special=True) == [tokenizer.eos_id]
    assert ids(content="a", add_special=True) == tokenizer.encode("a")
    assert ids(content="a", add_special=True)[0] == tokenizer.bos_id
    assert story_server.post("/detokenize", {"tokens": [1, 403, 2]}).json() == {"content": "<s>Once</s>"}


def test_pieces(story_server: Running) -> None:
    found = story_server.post("/tokenize", {"content": "Once 😀", "with_pieces": True}).json()["tokens"]
    assert found[0] == {"id": 403, "piece": " Once"}
    assert [piece["piece"] for piece in found[-4:]] == [[0xF0], [0x9F], [0x98], [0x80]]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "'content' is required"),
        ("/tokenize", {"content": "a", "bos": True}, "unknown field 'bos'"),
        ("/detokenize", {"tokens": [9999]}, "9999 is not in the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "expected an integer"),
        ("/apply-template", {"messages": []}, "not empty"),
        ("/apply-template", {"messages": [{"role": "user", "content": ""}], "model": "x"}, "not served here"),
    ],
)
def test_what_is_refused(path: str, body: Any, says: str, server: Running) -> None:
    response = server.post(path, body)
    assert response.status_code in (400, 404)
    assert says in response.json()["error"]["message"]


def test_a_model_without_tokenizer(llm: LLM) -> None:
    with running(LLM(llm.model)) as server:
        for path, body in (("/tokenize", {"content": "a"}), ("/detokenize", {"tokens": [1]})):
            response = server.post(path, body)
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]


def test_health_figures_and_pages(server: Running) -> None:
    assert server.get("/health").json() == server.get("/ready").json() == {"status": "ok"}
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metrics.text.startswith("# TYPE puna_steps counter")
    assert server.get("/status", headers={"accept": "application/json"}).json()["model"] == "tiny"
    for path in ("/", "/status"):
        assert (
            server.get(path, headers={"accept": "text/html"}).headers["content-type"].startswith("text/html")
        )


def test_a_server_that_stops_is_not_ready(llm: LLM) -> None:
    with running(llm) as server:
        server.state.draining = True
        assert server.get("/health").status_code == 200
        assert server.get("/ready").status_code == 503


def test_a_dead_engine_is_told(llm: LLM) -> None:
    with running(llm) as server:
        server.state.worker.fault = RuntimeError("of a test")
        for path in ("/health", "/ready"):
            response = server.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 503
        assert "engine has failed" in response.json()["error"]["message"]
        server.state.worker.fault = None


def test_a_device_that_is_broken_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(llm) as server:
        asked = {"prompt": "a", "max_tokens": 1}
        with monkeypatch.context() as patched:
            patched.setattr(server.state.llm.engine, "_hidden", _raise)
            for number in range(FAILURES):
                assert server.get("/health").status_code == 200, number
                assert server.post("/v1/completions", asked).status_code == 500
            assert "last 8 answers" in server.get("/health").json()["error"]["message"]
        assert server.post("/v1/completions", asked).status_code == 200
        assert server.get("/health").status_code == 200


def _raise(*_: Any) -> Any:
    raise ArithmeticError("of a test")


def test_a_fault_of_ours_is_told_without_details(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(llm) as server:
        monkeypatch.setattr(server.state.llm, "request", lambda *_, **__: 1 / 0)
        response = server.post("/v1/completions", {"prompt": "secret"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "ZeroDivision" not in response.text
    assert "ZeroDivision" in caplog.text


def test_paths_and_methods_that_are_not_there(server: Running) -> None:
    for path in ("/nope", "/v1", "/docs", "/redoc", "/v1/chat/completions/", "/..%2f..%2fetc/passwd"):
        response = server.get(path)
        assert response.status_code == 404
        assert "no such path" in response.json()["error"]["message"]
    response = server.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"].endswith("this path takes POST")
    response = server.client.put("/health")
    assert response.headers["allow"] == "GET, HEAD"
    assert response.json()["error"]["message"].endswith("this path takes GET, HEAD")
    for path, near in (("/chat/completions", "/v1/chat/completions"), ("/v1/completion", "/v1/completions")):
        assert server.get(path).json()["error"]["message"].endswith(f"Did you mean {near!r}?")
    assert "Did you mean" not in server.get("/api/generate").text


@pytest.mark.parametrize(
    "path", ["/", "/status", "/health", "/ready", "/metrics", "/v1/models", "/openapi.json"]
)
def test_a_head_is_what_get_says_without_the_body(path: str, server: Running) -> None:
    whole, head = server.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    assert server.client.head("/v1/models/other").status_code == 404


def test_the_description(server: Running) -> None:
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template"),
        *("/v1/models", "/v1/models/{id}", "/health", "/ready", "/metrics", "/", "/status"),
    }
    assert "422" not in str(described["paths"])
    text = server.get("/openapi.json").text
    shapes = described["components"]["schemas"]
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in shapes
