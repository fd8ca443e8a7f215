"""Proof that two models are the same.

verify.py      compare: run the same tokens through both
verdict.py     what that found, and whether they are
layerwise.py   hidden states of a model in memory, or read layer by layer
divergence.py  how far logits are apart
sketches.py    what is kept of every row of every tensor
rounding.py    what each stored type may change, and whether rows are further apart
agreement.py   whether tokenizers and templates are the same
tokens.py      which tokens are run
texts.py       the text and the strings they come from
"""
