"""Quantization: a model rewritten so that its matrices take less memory, or lie as products read them."""
