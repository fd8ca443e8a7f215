"""Files ↔ models: what a path holds is told by its content, and every format gives and takes `Weights`.

source.py              Source: an opened model, its weights not read yet
content.py             what is to be written, and what of it a format cannot hold
opening.py             FORMATS, and open_model(path), which chooses among them
saving.py              save: a Hugging Face directory with its provenance, whole or not at all
huggingface.py         a Hugging Face directory, read and written
config_json.py         config.json ⇄ ModelConfig
meta.py                Meta's own files, read and written
meta_params.py         params.json ⇄ ModelConfig
meta_shards.py         one model over model-parallel ranks
meta_names.py          the names of Meta's tensors
llama2c.py             llama2.c's files, read and written
llama2c_layout.py      where its .bin keeps what
llama2c_checkpoint.py  its ckpt.pt
llama2c_limits.py      what its programs have no place for
gguf.py                llama.cpp's files, read and written
gguf_header.py         their header, scanned within bounds
gguf_config.py         their metadata and names ⇄ ModelConfig
gguf_rope.py           rotary scaling in their terms
gguf_tensors.py        their tensors as views, checked against the config
gguf_writer.py         tensors and metadata into a file, streamed
gguf_tokenizer.py      their tokenizer, rebuilt
gguf_vocabulary.py     a tokenizer in their terms
gguf_pretokenizers.py  what llama.cpp calls the ways to cut text
beside.py              the tokenizer beside a model file that carries none
tensor_files.py        tensors of any kind of file, checked against the config
torch_archive.py       what torch.save wrote, as views of the mapped file
torch_pickle.py        the pickle in it, read as data
zip_directory.py       where the members of a zip archive lie
torch_writer.py        an archive that torch.load opens, streamed
safetensors_reader.py  tensors out of memory-mapped files, one or many
safetensors_writer.py  tensors into files of a chosen size, streamed
packed.py              low-bit matrices, packed and expanded
blocks.py              GGUF's blocks, expanded
casting.py             tensors in the types to store, checked on the way
rotary.py              half-split and interleaved rotary pairs
provenance.py          puna.json: where a model came from, and hashes of what it is
verify.py              proof that two models are the same
verdict.py             what that found, and whether they are
layerwise.py           hidden states of a model in memory, or read layer by layer
divergence.py          how far logits are apart
rounding.py            what each stored type may change
agreement.py           whether tokenizers and templates are the same
proof_tokens.py        which tokens are run
proof_texts.py         the text and the strings they come from
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
