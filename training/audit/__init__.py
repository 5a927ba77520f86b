"""Leakage audit: what of the test sets stands in the training data, and what repeats within it.

The way of a row: `fields` says which of its texts count, `text` turns them into word codes and `grams` into n-gram
hashes, a batch at a time. `index` holds the test sets, `limits` the thresholds, `scan` compares training rows with the
index, `repeats` finds repeats among them, `chunks` does both in worker processes. `report.audit_files` is the door,
`examples` shows leaks side by side, `clean` writes cleaned files, `job.run` is the command's target.
"""
