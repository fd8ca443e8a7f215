"""What a user runs: settings in, a finished thing out. Short assemblies of the rooms to the left.

run_settings.py  the settings of a training run
corpus.py        where its documents come from, its tokenizer, its token shards
pretrain.py      from scratch or from a model directory, to a trained model
session.py       a run while it goes on: validation, samples, checkpoints, export
length.py        how many updates a run makes
validation.py    loss, perplexity and bits per byte on held-out tokens
samples.py       what the model writes while it learns
compression.py   what gzip and xz need for the same text
demo.py          the whole path on the text that every Python carries
talk.py          a prompt continued, a conversation
describe.py      what a model is
tokenizers.py    training a tokenizer, looking at one
"""
