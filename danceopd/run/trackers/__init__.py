"""Experiment trackers: what a run logs, and its sample grids, go to TensorBoard, Weights & Biases or MLflow.

In: the names and options of a recipe's `trackers`. Out: `tracker.py`'s trackers, which the run's `Logger` feeds.
"""
