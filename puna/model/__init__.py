"""Ids to logits: config, presets, rotary embeddings, attention, the Llama, its weights and its costs."""
