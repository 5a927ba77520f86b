"""Google's checks of IFEval, as lm-evaluation-harness keeps them (Apache-2.0; see the heads of the files)."""
