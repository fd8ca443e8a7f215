"""Text → ids → text: one `Tokenizer` over three kinds of file, training, chat templates.

reading.py               load(path): which kind of file it is, and what stands beside it
tokenizer.py             Tokenizer, which everybody else holds
codec.py                 what a kind of file must offer
sentencepiece_reader.py  Llama 1 and 2, and what `train.py` makes
sentencepiece_writer.py  its file again, from pieces or from a tokenizer.json
llama2c_vocabulary.py    llama2.c's tokenizer.bin
tiktoken_reader.py       Llama 3
json_reader.py           tokenizer.json of Hugging Face
json_steps.py            what in one is refused before a library runs it
stream.py                ids → text as they come, never half a character
specials.py              where special tokens stand in a text
sidecar.py               tokenizer_config.json and the other files beside a tokenizer
extras.py                what of them decides no ids and is carried along
model_file.py            a tokenizer.model for tokenizers that came as tokenizer.json
saving.py, export.py     a directory that transformers opens with the same ids
merges.py, protobuf.py   BPE merges from scores or ranks; SentencePiece's own file format
train.py                 a new tokenizer, by LLaMA's rules
inspect.py               what a tokenizer knows, and how well it fits a text
chat.py                  conversations → ids
sandbox.py, meter.py     templates run within bounds, and what their work costs
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.tokenizer.tokenizer import Tokenizer


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or directory, of any kind; see `puna.tokenizer.reading.load`."""
    from puna.tokenizer import reading

    return reading.load(path)
