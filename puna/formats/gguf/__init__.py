"""GGUF, llama.cpp's files, read and written.

file.py           the format: read, write, what it cannot hold
header.py         the header, scanned within bounds
config.py         metadata and names ⇄ ModelConfig
rope.py           rotary scaling in its terms
tensors.py        tensors as views, checked against the config
writer.py         tensors and metadata into a file, streamed
tokenizer.py      its tokenizer, rebuilt
vocabulary.py     a tokenizer in its terms
pretokenizers.py  what llama.cpp calls the ways to cut text
"""
