"""From text to a trained model.

settings.py     what a RUN.toml may say
corpus.py       where its documents come from, its tokenizer, its token shards
pretrain.py     from scratch or from a model directory, to a trained model
parts.py        what a run is made of: objective, model, memory, rows
opening.py      from settings to a session: text read, model made, tried out and measured
session.py      a run while it goes on: updates, validation, samples, checkpoints, export
length.py       how many updates it makes
validation.py   loss, perplexity and bits per byte on held-out tokens
samples.py      what the model writes while it learns
compression.py  what gzip and xz need for the same text
"""
