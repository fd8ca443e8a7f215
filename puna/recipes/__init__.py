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
generate.py      a prompt continued, or several
generate_file.py a file of them: prompt_files.py reads it, answer_files.py keeps the answers
chat.py          a conversation in the terminal: conversation.py, chat_commands.py, terminal.py
describe.py      what a model is
quantization.py  a smaller model, measured as it is made: quantize_settings.py and quantize_job.py say what is
                 to be done, model_quantizer.py, layer_quantizer.py do it, unfinished.py keeps what is done,
                 calibration.py has the text, hidden_states.py the text on its way, damage.py the figures
tokenizers.py    training a tokenizer, looking at one
bench.py         speed on this machine: bench_generation.py runs the engine with the model of bench_model.py,
                 bench_figures.py sets what it did beside what the machine could do
"""
