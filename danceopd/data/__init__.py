"""Training data: from tables, folders and datasets on the hub to encoded conditions.

A data source of the recipe goes in; prompts, and pairs of an instruction and a source image come out (`sources.py`),
then the encoded conditions of the rows that a run uses (`dataset.py`). Rows are read when they are used, and encoded
rows are shared by runs through a cache on disk (`store.py`). Start with `sources.py`.
"""
