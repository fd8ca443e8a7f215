"""A server from its socket to its end: the model, uvicorn's protocol, signals, draining, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from puna import __version__
from puna.engine.fingerprint import fingerprint
from puna.engine.llm import LLM
from puna.errors import Interrupted, PunaError
from puna.progress import counted
from puna.serve.addresses import cannot_listen, listening_sockets, tls_context, url
from puna.serve.app import make_app
from puna.serve.connections import Connection, Listener
from puna.serve.facts import described
from puna.serve.guard import Guard
from puna.serve.keys import Keys, read_keys
from puna.serve.logs import Format, Log, LogHandler
from puna.serve.masks import known_names
from puna.serve.metrics import Metrics
from puna.serve.names import model_names
from puna.serve.origins import Origins, all_loopback
from puna.serve.settings import ServeSettings
from puna.serve.state import ServerState
from puna.serve.templates import check_template, template_text
from puna.serve.worker import EngineThread

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_SECONDS = 2.0  # in which clients that are cut off are told so
STEP_SECONDS = 15.0  # that the last step may take
HUNG_SECONDS = 600.0  # after which a step will never end; 512 rows of 70 billion weights take a CPU minutes
LOOK = 0.02  # seconds between two looks at whether all is answered

Say = Callable[[str], None]
Event = signal.Signals | BaseException


def serve(
    opened: Callable[[Say], LLM],
    model: str,
    settings: ServeSettings,
    say: Say,
) -> None:
    """Serve a model until a signal says that it is enough.

    What is wrong with settings, files or the port is told before the model is loaded.

    Args:
        opened: gives the model; what it is given says what is to be said.
        model: its path or hub id, as the user gave it; clients may call it so.
        settings: all else.
        say: where remarks go, and one line when the server is ready; with a log as JSON they go there.

    Raises:
        InputError: the settings, the model, or the port.
        Interrupted: a signal ended it.
        PunaError: the engine failed.
    """
    name, names = model_names(model, settings.model_name)
    with _logging(settings, names) as log:
        say = log.say if log.kind == "json" else say
        try:
            _served(opened, (name, names), settings, log, say)
        except PunaError as error:
            if log.kind == "json":
                log.say(str(error), "info" if isinstance(error, Interrupted) else "error")
                error.told = True
            raise


def _served(
    opened: Callable[[Say], LLM],
    called: tuple[str, frozenset[str]],
    settings: ServeSettings,
    log: Log,
    say: Say,
) -> None:
    """The same, with a log; `called` are the model's id and all its names."""
    settings = settings.model_copy(update={"template": template_text(settings.template)})
    keys, remarks = read_keys(settings.api_keys)
    tls = tls_context(settings)
    sockets = listening_sockets(settings.host, settings.port)
    try:
        local = all_loopback(listening.getsockname()[0] for listening in sockets)
        if not (local or keys):
            remarks.append("whoever reaches this machine may ask: there are no API keys (api_keys=FILE)")
        for remark in remarks:
            say(f"note: {remark}")
        llm = opened(say)
        if fault := check_template(llm, settings.template):
            say(f"note: {fault}")
        state, events = _state(llm, called, settings)
        with _signals_kept():
            known = Keys(keys, settings.requests_per_minute, settings.concurrent_requests)
            origins = Origins(settings.allowed_hosts, settings.cors_origins, local)
            guard = Guard(make_app(state), state, known, origins, log)
            listener = Listener(guard, sockets, settings, guard.finished, tls)
            for line in described(state, len(keys)):
                say(line)
            gc.freeze()  # libraries and model stay: looking through them stops the world for nothing
            asyncio.run(_Server(state, listener, events, log).run(sockets, tls, say))
    finally:
        for listening in sockets:
            listening.close()


class _Server:
    """A server at work, and how it ends."""

    def __init__(
        self, state: ServerState, listener: Listener, events: asyncio.Queue[Event], log: Log
    ) -> None:
        self._state, self._listener, self._events, self._log = state, listener, events, log

    async def run(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None, say: Say) -> None:
        """Until a signal comes, or the engine fails; either is raised."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._events.put_nowait, number)
        self._state.worker.start()
        try:
            self._listener.start()
        except OSError as error:
            host, port = sockets[0].getsockname()[:2]
            raise cannot_listen(host, port, error) from None
        say(f"Serving {self._state.model_id} at {url(sockets, tls is not None)}")
        watching = loop.create_task(self._watch_steps())
        event = await self._events.get()
        watching.cancel()
        if isinstance(event, signal.Signals):
            event = await self._drained(event)
        await self._cut_off(event)
        if isinstance(event, signal.Signals):
            raise Interrupted(event)
        raise PunaError(f"the engine failed: {type(event).__name__}: {event}")

    async def _watch_steps(self) -> None:
        """A server whose engine hangs must not stay up deaf."""
        while self._state.worker.stepping_for < HUNG_SECONDS:
            await asyncio.sleep(min(HUNG_SECONDS / 10, 10))
        self._events.put_nowait(TimeoutError(f"a step takes more than {HUNG_SECONDS:g} seconds"))

    async def _drained(self, number: signal.Signals) -> Event:
        """Take on nothing new and let what runs go on for a while; what ends the server then."""
        self._state.draining = True
        listener, seconds = self._listener, self._state.settings.drain_seconds
        at_work = len(listener.requests)
        self._log.say(
            f"{number.name}: what is at work ({at_work:,}) may go on for {counted(seconds, 'second')}"
        )
        listener.end_idle()
        done = asyncio.ensure_future(self._done(set(listener.requests), listener.all))
        again = asyncio.ensure_future(self._events.get())
        await asyncio.wait((done, again), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if done.done() and (fault := done.exception()) is not None:
            self._log.fault(fault, what="draining")
        done.cancel()
        again.cancel()
        if again.done() and not again.cancelled() and isinstance(again.result(), Exception):
            return again.result()
        return number

    async def _cut_off(self, event: Event) -> None:
        """End what is unfinished with an error, tell its clients, close everything."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:  # whoever asks a third time has waited enough
            loop.add_signal_handler(number, os._exit, 128 + number)
        if isinstance(event, BaseException):
            self._log.fault(event)
        self._listener.stop()
        left = len(self._listener.requests)
        if left:
            self._log.say(f"cutting off what is at work ({left:,})", "warning")
        stuck = False
        try:
            await asyncio.wait_for(self._state.worker.stop(), STEP_SECONDS)
        except TimeoutError:  # what is unfinished has been told so all the same
            stuck = True
        with contextlib.suppress(TimeoutError):
            requests, connections = set(self._listener.requests), self._listener.all
            await asyncio.wait_for(self._done(requests, connections), LAST_SECONDS)
        for task in tuple(self._listener.requests):
            task.cancel()
        self._listener.abort()
        if stuck:
            self._leave(event)

    async def _done(self, requests: set[asyncio.Task[None]], connections: set[Connection]) -> None:
        """Until requests are answered, and their answers sent."""
        while not all(task.done() for task in requests) or connections & self._listener.all:
            self._listener.end_idle()
            await asyncio.sleep(LOOK)

    def _leave(self, event: Event) -> None:
        """A step that does not end cannot be ended, and Python would wait for its thread."""
        self._log.say(
            f"a step takes more than {STEP_SECONDS:g} seconds; leaving in the middle of it", "error"
        )
        self._log.close()
        os._exit(128 + event if isinstance(event, signal.Signals) else 1)


def _state(
    llm: LLM, called: tuple[str, frozenset[str]], settings: ServeSettings
) -> tuple[ServerState, asyncio.Queue[Event]]:
    """What routes reach, and where signals and the engine's failure arrive."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    metrics = Metrics(llm.engine)
    worker = EngineThread(llm.engine, metrics, settings.max_waiting, events.put_nowait)
    state = ServerState(
        llm=llm,
        worker=worker,
        settings=settings,
        model_id=called[0],
        names=called[1],
        fingerprint=_fingerprint(llm),
        created=int(time.time()),
        metrics=metrics,
    )
    return state, events


def _fingerprint(llm: LLM) -> str:
    """Of model and program, as short as OpenAI's."""
    versions = f"{__version__} {torch.__version__} {llm.engine_settings.cache_dtype}"
    return f"fp_{hashlib.sha256(f'{versions} {fingerprint(llm)}'.encode()).hexdigest()[:12]}"


@contextmanager
def _logging(settings: ServeSettings, names: frozenset[str]) -> Iterator[Log]:
    """A log, and what libraries say in it."""
    kind: Format = "json" if settings.log_format == "json" else "text"
    if settings.log_format == "auto":
        kind = "text" if sys.stderr.isatty() else "json"
    known_names()  # found now, not while the first client that errs holds up the others
    log = Log(kind, settings.log_prompts, names=names)
    handler, root, uvicorn = LogHandler(log), logging.getLogger(), logging.getLogger("uvicorn.error")
    root.addHandler(handler)
    logging.captureWarnings(kind == "json")
    uvicorn.disabled = True  # the guard and the connections tell of the same with a request's id
    try:
        yield log
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        uvicorn.disabled = False
        log.close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Afterwards signals mean what they meant before; an event loop resets them to the system's own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
