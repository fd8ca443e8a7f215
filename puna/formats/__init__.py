"""Files ↔ models: what a path holds is told by its content, and every format gives and takes `Weights`.

source.py        Source: an opened model, its weights not read yet
content.py       what is to be written, and what of it a format cannot hold
opening.py       FORMATS, and open_model(path), which chooses among them
saving.py        save: a Hugging Face directory with its provenance, whole or not at all
convert.py       one format into another: written aside, compared with its source, then named
hub.py           a path, or an id on the Hugging Face hub → a path
provenance.py    puna.json: where a model came from, and hashes of what it is

huggingface/     a Hugging Face directory
meta/            Meta's own files
gguf/            llama.cpp's files
llama2c/         llama2.c's files
archives/        what torch.save writes
proof/           whether two models are the same

tensor_files.py  tensors of any kind of file, checked against the config
casting.py       tensors in the types to store, checked on the way
packed.py        low-bit matrices, packed and expanded
blocks.py        GGUF's blocks, expanded
rotary.py        half-split and interleaved rotary pairs
watching.py      files that must not become shorter while they are mapped
beside.py        the tokenizer beside a model file that carries none
json_files.py    small JSON objects, read with bounds
"""

from __future__ import annotations

from puna.formats.hub import resolve
from puna.formats.opening import FORMATS, open_model
from puna.formats.packed import expanded
from puna.formats.saving import save
from puna.formats.source import Source

__all__ = ["FORMATS", "Source", "expanded", "open_model", "resolve", "save"]
