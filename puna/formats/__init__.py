"""Files ↔ models: what a path holds is told by its content, and every format gives and takes `Weights`.

source.py              Source: an opened model, its weights not read yet
content.py             what is to be written, and what of it a format cannot hold
opening.py             FORMATS, and open_model(path), which chooses among them
saving.py              save: a Hugging Face directory with its provenance, whole or not at all
huggingface.py         a Hugging Face directory, read and written
config_json.py         config.json ⇄ ModelConfig
safetensors_reader.py  tensors out of memory-mapped files, one or many
safetensors_writer.py  tensors into files of a chosen size, streamed
packed.py              low-bit matrices, packed and expanded
casting.py             tensors in the types to store, checked on the way
rotary.py              half-split and interleaved rotary pairs
provenance.py          puna.json: where a model came from, and hashes of what it is
json_files.py          small JSON objects, read with bounds
hub.py                 a path, or an id on the Hugging Face hub → a path
"""

from __future__ import annotations

from puna.formats.hub import resolve
from puna.formats.opening import FORMATS, open_model
from puna.formats.packed import expanded
from puna.formats.saving import save
from puna.formats.source import Source

__all__ = ["FORMATS", "Source", "expanded", "open_model", "resolve", "save"]
