"""llama2.c's files, read and written.

file.py        the format: read, write
layout.py      where a .bin keeps what
checkpoint.py  its ckpt.pt
limits.py      what its programs have no place for
"""
