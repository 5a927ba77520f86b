"""Verification: reads a finished merge back and says what is really in it. Called by jobs, never by the merge.

It shares only the file reader (engine/weights/tensorfile, checkpoint) with the code that merges. Scales,
orientation, sums and rounding are written again here, plainly, so that a bug in one shows in the other.

    check      verify_merge: the whole procedure, one read of the merge and one of the base
    deltas     adapter folders -> B, A and scale per base tensor, from adapter_config.json
    rounding   correct rounding of float64 to bfloat16, float16 and float32
    measure    one tensor in row blocks: is every element right, and what a least-squares fit needs
    fit        weights, residuals and identifiability from those measurements
    files      tensors, shards, config, tokenizer and chat template; hashes of an earlier merge's manifest
    replay     what known mistakes of merging tools would have written, bit by bit, on sampled rows
    diagnose   wrong elements -> findings, in words
    conclude   everything measured -> the verdict
    guess      which weights to judge by when nobody says
    sample     the rows those are tried on
    verdict    Finding and Verdict
"""

from engine.merge.verify.check import verify_merge
from engine.merge.verify.verdict import Finding, Verdict

__all__ = ["Finding", "Verdict", "verify_merge"]
