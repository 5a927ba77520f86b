"""Training data from files: `rows` reads tables and texts, `samples` makes training samples of rows,
`dataset_info` understands LLaMA-Factory's table of data sets, `sources` says which files with which weight.

    from training.data.sources import parse_sources, read_source

Everything streams: a file of any size is read in pieces.
"""
