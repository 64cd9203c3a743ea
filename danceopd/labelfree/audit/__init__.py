"""Does a signal rank the model's own samples of one question? Measured before anything is trained.

In: groups of samples, what is true of each, and the signals' numbers. Out: figures with intervals and sentences
(`figures.py`), tables of them (`table.py`), a sheet of pictures (`sheet.py`). `signals.py` are the signals that every
audit tries beside the recipe's own rewards. `danceopd/audit.py` draws the samples and calls all of it.
"""
