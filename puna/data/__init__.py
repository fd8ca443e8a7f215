"""Documents → token shards → packed rows → batches, in an order that is a pure function of (seed, position).

inputs.py      files, directories and glob patterns → files
readers.py     files of many kinds → documents
stdlib.py      the corpus that every Python carries: its standard library's source
similarity.py  near copies, tables and generated files
holdout.py     which text is held out from training
encoding.py    documents → tokens, on several threads
prepare.py     all of that, resumable, into a directory of shards
shardfile.py   the binary file of one shard
shards.py      a directory of shards as one long sequence of tokens
packing.py     stretches of that sequence → rows with document boundaries
order.py       the pseudo-random order of rows
batches.py     what the training loop receives
loader.py      rows → steps of micro-batches, for any number of ranks
prefetch.py    the next items made ahead, in a thread
"""
