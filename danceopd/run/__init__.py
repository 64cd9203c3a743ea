"""What hangs on a run: its directory, checkpoints, logs, samples, validation, early stopping, limits, the export.

In: a `Trainer` and a recipe. Out: the run folder (`directory.py` says what is in it). Each optional part is a callback
of the trainer: `Checkpoints`, `MetricsLog`, `Samples`, `EarlyStopping`, `Limits`. `export.py` writes the student at the
end and proves it through the stock pipeline. Read `directory.py` first, then `checkpoints.py`.
"""
