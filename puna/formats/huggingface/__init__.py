"""A Hugging Face model directory, read and written.

directory.py           the format: read, write, what it cannot hold
config_json.py         config.json ⇄ ModelConfig
yi_names.py            the first Yi files call their norms otherwise
safetensors_reader.py  tensors out of memory-mapped files, one or many
safetensors_layout.py  the bytes of such a file
safetensors_writer.py  tensors into files of a chosen size, streamed
quantized.py           which layout a quantized directory has, or gets
compressed_tensors.py  whole numbers as vLLM and transformers take them: the config, and what is written
quantized_files.py     the same, read out of its parts
bitsandbytes.py        NF4 as bitsandbytes publishes it
"""
