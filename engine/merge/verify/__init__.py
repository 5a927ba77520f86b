"""Verification: reads a finished merge back and says what is really in it. Called by jobs, never by the merge.

It shares only the file reader (engine/weights/tensorfile, checkpoint) with the code that merges. Scales,
orientation, sums and rounding are written again here, plainly, so that a bug in one shows in the other.

    asked        what was asked: method, entries, numbers by tensor; through JSON and back
    check        verify_merge: the whole procedure, one read of the merge and one of the base
    tasks        adapters and models opened, and what every touched tensor should have become
    deltas       adapter folders -> what each changes, by base tensor (lora_config, experts: parts of it)
    terms        low-rank changes, dense by blocks and exact by elements; whole: tensors, biases, DoRA
    tokens       vocabularies that differ: rows by token
    formulas     every method's value and what may go either way; threshold, draws: TIES' and DARE's numbers
    measure      one tensor of a linear merge of plain LoRA; dense: any other, by blocks (comparison)
    stats        what measuring gives; bits, rounding: stored numbers; quick: the compiled loops (_verify.c)
    fit          weights, residuals and identifiability from those measurements
    files        tensors, shards, config, tokenizer and chat template
    replay       what known mistakes of merging tools would have written, bit by bit, on sampled rows
    hypotheses   the same for methods that are not linear: other parameters and methods
    diagnose     wrong elements -> findings, in words
    conclude     everything measured -> the verdict
    guess        which weights to judge by when nobody says
    sample       the rows those are tried on
    verdict      Finding and Verdict
"""

from engine.merge.verify.asked import Asked, AskedEntry
from engine.merge.verify.check import verify_merge
from engine.merge.verify.verdict import Finding, Verdict

__all__ = ["Asked", "AskedEntry", "Finding", "Verdict", "verify_merge"]
