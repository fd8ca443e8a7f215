"""Requests → tokens.

sampling.py  SamplingParams, the rules that shape a distribution, the draw from it
text.py      tokens of one answer → text, cut at stop strings, safe to show piece by piece
sequence.py  one request: its prompt, its tokens so far, why it ended; no tensors
cache.py     keys and values of a batch, each row at its own positions
engine.py    the step: prefill, then one token for every row until all are done
llm.py       LLM, which users hold, and load
"""
