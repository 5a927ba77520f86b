"""Leakage audit: what of the test sets stands in the training data, and what repeats within it.

`text` turns rows into comparable words, `detectors` holds the three detectors, `report` runs them over files,
`job.run` is the command's target.
"""
