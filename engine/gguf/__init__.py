"""Checkpoints and adapters as GGUF files for llama.cpp.

`architecture` reads what a model is from config.json, `tokenizer` what its tokenizer is, `tensors` plans every
tensor's name, rows and order, `writer` streams them to a file, `quantize` knows the types and calls llama.cpp,
`convert` puts a checkpoint together, `lora` an adapter, `check` compares a finished file with its source,
`live` prepares a base and adapters for mixing while chatting, `job` is what a job runs.
"""
