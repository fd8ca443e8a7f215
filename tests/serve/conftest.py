"""Servers that tests ask: of a small random model, and of a small trained one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest

from puna.engine.constraints import Grammars
from puna.engine.llm import LLM
from puna.engine.loading import load
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer
from tests.model.shapes import model_of
from tests.small import small_config, small_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from tests.serve.running import Running, running

CONTEXT = 512


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Most of its pieces are single bytes."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def config(tokenizer: Tokenizer) -> ModelConfig:
    """Fits the tokenizer."""
    return small_config(tokenizer, CONTEXT)


@pytest.fixture(scope="session")
def llm(config: ModelConfig, tokenizer: Tokenizer) -> LLM:
    """Random, with strong opinions: greedy choices are never close."""
    return LLM(model_of(config).eval(), tokenizer)


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Running]:
    """A server of the random model, with every setting as it is by default."""
    with running(llm) as it:
        yield it


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    """What answers may be held to."""
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)


@pytest.fixture(scope="session")
def stories(assets: Path) -> LLM:
    """A small trained model with a SentencePiece tokenizer of 512 pieces; context 512."""
    return load(assets / "weights/stories260K/stories260K.bin", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def story_server(stories: LLM) -> Iterator[Running]:
    """A server of it."""
    with running(stories) as it:
        yield it


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that it signed itself, and its key."""
    if which("openssl") is None:
        pytest.skip("openssl is not installed: it makes the certificate")
    directory = tmp_path_factory.mktemp("tls")
    made = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", str(made[1]), "-out", str(made[0]), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return made
