"""What a cell can run on besides a checkpoint in this process: `gguf` (llama.cpp) and `server` (OpenAI-compatible).

engine/evaluate/bench.py opens them; each gives a Work with prompts, batches and rows, as execute.CellWork does.
`sequences` is the layer over llama.cpp, `client` the one over HTTP.
"""
