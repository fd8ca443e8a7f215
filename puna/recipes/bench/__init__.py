"""Speed on this machine, beside what the machine could do at most.

command.py            which benchmarks there are, and how their figures are printed
figures.py            a figure beside the machine's limit, measured at the same moment
training.py           whole updates: training_settings.py says of what, training_case.py runs one case
generation.py         decoding and prompts, with the model of model.py; work.py counts what it is made of
serving.py            a server under load: load_generator.py and http_replies.py are its clients
load.py               one such load; server_process.py: the server
made_up_tokenizer.py  words for models that have none
"""
