"""What a server is told: where it listens, who may ask, how much it takes on, how it ends."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from puna.engine.settings import EngineSettings
from puna.settings import Settings, parse


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
    """A chat template in place of the model's own: a name, or the text of one."""
    api_keys: str | None = None
    """A file of keys, one in each line, perhaps after a name and white space; the environment's
    PUNA_API_KEYS, separated by commas, are taken too. Without any, whoever reaches the server may ask."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Of each key, or of everyone together where there are none."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Of each key at the same time, or of everyone together where there are none."""
    max_waiting: int = Field(256, ge=0)
    """Answers that may wait beside those that run (`engine.max_running`); beyond them: 429."""
    cors_origins: list[str] = []
    """Pages of these origins may ask from a browser, such as https://example.org; * is any."""
    allowed_hosts: list[str] = []
    """Names by which clients reach the server; empty: any, and on loopback addresses only loopback's names,
    so that no page can ask by giving a name of its own to this machine."""
    tls_certificate: str | None = None
    """A PEM file: the certificate, and those between it and a root."""
    tls_key: str | None = None
    """A PEM file: the certificate's private key, without a passphrase."""
    max_body_bytes: int = Field(8 << 20, ge=1024)
    """Of a request; beyond it: 413."""
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ValueError(f"tls_certificate and tls_key go together: give {missing} too")
        return self
