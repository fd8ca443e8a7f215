"""From text to a trained model.

settings.py     what a RUN.toml may say
corpus.py       where its documents come from, its tokenizer, its token shards
pretrain.py     from scratch or from a model directory, to a trained model
session.py      a run while it goes on: validation, samples, checkpoints, export
length.py       how many updates it makes
validation.py   loss, perplexity and bits per byte on held-out tokens
samples.py      what the model writes while it learns
compression.py  what gzip and xz need for the same text
"""
