"""The door: parse, call, print. No logic, and nothing heavy is imported before a command needs it.

app.py         the commands as one program, and how it ends
options.py     what several commands take; printing.py: where what they say goes; importing.py: how
               libraries come without delay
training.py, generation.py, models.py, quantizing.py, measuring.py, tokenizers.py: the
               commands, a function each
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    try:
        from puna.cli.app import run  # inside: Ctrl-C while the door itself is imported is no fault of ours

        run()
    except KeyboardInterrupt:
        print("puna: stopped", file=sys.stderr)
        sys.exit(130)
