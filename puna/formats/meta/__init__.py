"""Meta's own files, read and written.

directory.py  the format: read, write, what it cannot hold
params.py     params.json ⇄ ModelConfig
shards.py     one model over model-parallel ranks
names.py      the names of Meta's tensors
"""
