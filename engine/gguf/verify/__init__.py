"""GGUF verification: reads a finished file back and says what is really in it.

It shares only file readers with the code that makes GGUFs, and with the verification of folders the deltas, the
rounding and the words of the verdict.

    check      verify_gguf: the whole procedure
    asked      which checkpoint tensor each GGUF tensor should hold, its deltas, the order of q's and k's rows
    measure    one tensor in row blocks: is every element right, and what a least-squares fit needs
    fit        weights, their standard errors, residuals
    sample     rows kept in memory to try other weights on
    guess      which weights to judge by when nobody says
    diagnose   wrong elements -> findings, in words
    metadata   hyperparameters, tokenizer, chat template
    conclude   everything measured -> the verdict
"""

from engine.gguf.verify.check import verify_gguf
from engine.gguf.verify.conclude import GgufVerdict

__all__ = ["GgufVerdict", "verify_gguf"]
