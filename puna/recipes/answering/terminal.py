"""Where a person types and reads: editing and history, text pasted whole, remarks out of an answer's way."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Read = Callable[[str], str | None]
"""`read(prompt)` → a line without its end; None at the end of the input."""

Write = Callable[[str], None]

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
QUOTES = '"""'


def line_reader() -> Read:
    """Reads standard input; on a terminal with editing and history, and what is pasted counts as one line.

    The prompt is shown only to a person, and never among answers that go to a file.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plainly
    with contextlib.suppress(ImportError):  # not everywhere: then input() does without
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
        return lambda prompt: _read_edited(prompt, readline.get_line_buffer)
    return lambda prompt: _read_edited(prompt, lambda: "")


def _read_edited(prompt: str, typed: Callable[[], str]) -> str | None:
    """A line; "" where Ctrl-C cleared what was `typed` of one."""
    try:
        return input(prompt)
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not typed():
            raise
        print()
        return ""


def _read_plainly(prompt: str) -> str | None:
    if sys.stdin.isatty():
        note(prompt, end="")
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def is_person() -> bool:
    """Whether somebody types, rather than that a file or a program is the input."""
    return sys.stdin.isatty()


def note(text: str, end: str = "\n") -> None:
    """A remark of the program's: on standard error, so that standard output holds answers alone."""
    dim, plain = (DIM, PLAIN) if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{plain}", end=end, file=sys.stderr, flush=True)


def read_message(read: Read) -> str | None:
    '''A line, or what stands between a line that begins with """ and one that ends with it.

    Ctrl-C clears what is typed of a message: then it is empty.

    Raises:
        KeyboardInterrupt: Ctrl-C where nothing of a message is typed.
    '''
    line = read("\nyou> ")
    if line is None or not line.lstrip().startswith(QUOTES):
        return line
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        try:
            more = read("...> ")
        except KeyboardInterrupt:
            note("\n[cleared]")
            return ""
        if more is None:
            return "\n".join(lines)
        lines.append(more)
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    text = "\n".join(lines).strip("\n")
    return f" {text}" if text.startswith("/") else text  # a quoted command is none


class Interrupt:
    """Whether Ctrl-C was pressed, and what is done where it is."""

    def __init__(self) -> None:
        self.asked = False
        self.act: Callable[[], None] = lambda: None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Act at the first; a second one does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.act()


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Collect Ctrl-C inside the context, so that it strikes between two steps and not in one."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # Python lets only the main thread handle signals
        return
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
