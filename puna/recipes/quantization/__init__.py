"""A smaller model, one layer in memory at a time, measured against its source as it is made.

settings.py     what may be asked for
job.py          what is to be done, once everything was checked
run.py          from the source to the finished directory
model.py        the steps, from the embedding to the logits; layer.py has those of one layer
unfinished.py   what is done so far, for a run that goes on
calibration.py  the text; hidden_states.py: the same on its way through the model
damage.py       what it cost, in figures
"""
