"""Chat with GGUF models: one child process per model file, llama.cpp inside, one context per pane.

`client` starts and talks to the child (imports nothing heavy), `protocol` holds the messages between them,
`child` is what the process runs, `runtime` the typed layer over llama.cpp, `stream` turns tokens into text.
"""
