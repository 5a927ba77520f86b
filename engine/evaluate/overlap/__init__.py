"""Overlap of texts with references: words (`words`), n-grams in common (`grams`), the metrics (`scores`).

The door is engine/evaluate/metrics.py.
"""
