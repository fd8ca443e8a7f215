"""Requests → tokens.

llm.py          LLM, which users hold; loading.py: any model as one; arriving.py: its tensors on their way
stream.py       an answer's text as it is made; completion.py: the whole of it
settings.py     what an engine is given; params.py: what one request asks for
engine.py       the step: what the scheduler chose goes through the model as one flat pass
answer.py       a request and its sequences on their way
sequence.py     one answer in the making; blocks.py: memory for keys and values; scheduler.py: who is next
cache.py        keys and values in blocks, attended to where they lie
rows.py         numbers of rows that are shown to treat a row alike; probes.py: by what; still.py: on what
sampling.py     from logits to a token: rules.py in order, draw.py among what is left, state.py remembers
constraints.py  which tokens a schema, an expression or a grammar admits; patterns.py translates expressions
text.py         tokens of one answer → text, cut at stop strings, safe to show piece by piece
"""
