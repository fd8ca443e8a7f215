"""What a server is told: where it listens, who may ask, how much it takes on, how it ends."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from puna.engine.settings import EngineSettings
from puna.settings import Bytes, Settings, parse

OPTIONS = (
    "tokenizer",
    "device",
    "dtype",
    "quantize",
    "revision",
    "cache_dir",
)  # of the command line: they choose a model


def _listed(value: Any) -> Any:
    """A text stands for a list of what its commas part."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed)]


class ServeSettings(Settings):
    """How a model is served; none of it changes an answer, `engine.cache_dtype` and `template` excepted.

    Raises:
        SettingsError: through `puna.settings.parse`, in one line.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    host: str = Field("127.0.0.1", min_length=1)
    """The address to listen on; 0.0.0.0 is every network this machine is in: then give it keys."""
    port: int = Field(8000, ge=0, le=65_535)
    """0: any free one; the log says which."""
    model_name: str | None = Field(None, min_length=1)
    """What clients call the model; none: the last part of its path or hub id."""
    template: str | None = None
    """A chat template in place of the model's own: a name, a file, or the text of one."""
    api_keys: str | None = None
    """A file of keys, one in each line, perhaps after a name and white space; the environment's
    PUNA_API_KEYS, separated by commas, are taken too. Without any, whoever reaches the server may ask."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Of each key, or of everyone together where there are none."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Of each key at the same time, or of everyone together where there are none."""
    max_waiting: int = Field(256, ge=0)
    """Answers that may wait beside those that run (`engine.max_running`); beyond them: 429."""
    cors_origins: Texts = []
    """Pages of these origins may ask from a browser, such as https://example.org; * is any."""
    allowed_hosts: Texts = []
    """Names by which clients reach the server; empty: any, and on loopback addresses only loopback's names,
    so that no page can ask by giving a name of its own to this machine."""
    tls_certificate: str | None = None
    """A PEM file: the certificate, and those between it and a root."""
    tls_key: str | None = None
    """A PEM file: the certificate's private key, without a passphrase."""
    max_body_bytes: Bytes | None = Field(None, ge=1024)
    """Of a request; beyond it: 413. None: what a prompt as long as the context may take, and 1 MiB beside."""
    max_connections: int = Field(4096, ge=1)
    """At once; beyond them the one that idles longest is closed, or the new one where none does."""
    header_seconds: float = Field(10.0, gt=0, le=3600)
    """A connection has this long to send a request's headers."""
    idle_seconds: float = Field(75.0, gt=0, le=3600)
    """A connection may idle this long between requests; longer than a balancer before it keeps one, or it
    meets connections that have just been closed. (AWS's keeps them for 60 seconds, Google's for 600.)"""
    body_seconds: float = Field(30.0, gt=0, le=3600)
    """A request has this long to send its body; beyond it: 408. A client that takes nothing of its answer
    for as long is cut off."""
    request_seconds: float = Field(600.0, gt=0, le=86_400)
    """From a request's arrival to the end of its answer, waiting included; beyond it: given up, 504."""
    drain_seconds: float = Field(30.0, ge=0, le=86_400)
    """After SIGTERM or Ctrl-C what runs may go on this long; a second signal cuts it off at once."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """One line on standard error for each request; auto: text on a terminal, json elsewhere."""
    log_prompts: bool = False
    """Whether the log has prompts and answers."""
    engine: EngineSettings = parse(EngineSettings, {})
    """Memory for answers, and how many are made at once."""

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, values: Any) -> Any:
        for name in OPTIONS:
            if isinstance(values, dict) and name in values:
                option = name.replace("_", "-")
                raise ValueError(f"{name!r} is an option of the command, no setting; give --{option} VALUE")
        return values

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if "/" in host or re.fullmatch(r"[^:]+:\d*", host):
                name = urlsplit(host if "//" in host else f"//{host}").hostname or "example.org"
                raise ValueError(f"expected a name without scheme, port and path, got {host!r}; write {name}")
        return hosts

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ValueError(f"tls_certificate and tls_key go together: give {missing} too")
        return self
