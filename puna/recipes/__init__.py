"""What a user runs: settings in, a finished thing out. Short assemblies of the rooms to the left.

training/      from text to a trained model: a run, its settings, what happens in it besides updates
answering/     prompts, files of prompts and conversations, answered in the terminal
quantization/  a smaller model, measured against its source as it is made
bench/         speed on this machine, beside what the machine could do at most
demo.py        the whole path on the text that every Python carries
tokenizers.py  training a tokenizer, looking at one
convert.py     a model in another format; whether two are the same
describe.py    what a model is
models.py      which model a command works on
"""
