"""One command for each claim of speed and memory, each a ratio to a peer or a physical floor in the same run."""
