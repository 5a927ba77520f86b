"""Other tools doing the same work, each as a program of its own to be timed: PEFT, mergekit, deltalint.

`rows` has a function per peer that returns a `Peer`; `run(peer)` times it. `python -m benchmarks.peers` runs all of
them once on a small model and has their results verified. Called by benchmarks/merge.py for the large table.
"""
