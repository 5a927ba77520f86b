"""The demo workspace: a real 135M base, two adapters trained by this program, small data sets.

`job.run` makes it (`medmerge demo`); `base.make_base` makes the base; `build_data` is the maintainers' script
that cut the shipped data from the published sets. `data/` and `adapters/` are package data.
"""
