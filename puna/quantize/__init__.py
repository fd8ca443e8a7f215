"""Quantization: a model rewritten so that its matrices take less memory, or lie as products read them.

schemes.py   the schemes, and rounding to nearest: scales.py chooses scales, codes.py holds whole numbers
recipe.py    which tensors are quantized, and how
gptq.py      rounding whose errors later weights make good
nf4.py       linear layers for fine-tuning
packing.py   a built model rewritten, and back: packed.py has its modules, matrices.py what they hold
loading.py   quantized tensors on their way into a model; release.py: pages of a file given back
"""
