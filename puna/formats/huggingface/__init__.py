"""A Hugging Face model directory, read and written.

directory.py           the format: read, write, what it cannot hold
config_json.py         config.json ⇄ ModelConfig
yi_names.py            the first Yi files call their norms otherwise
safetensors_reader.py  tensors out of memory-mapped files, one or many
safetensors_writer.py  tensors into files of a chosen size, streamed
"""
