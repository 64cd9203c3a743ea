"""Metrics that need no judge: what an edit preserved, sharpness, saturation, collapse, feature similarity.

In: an image of an item, its source and target; or all images of a model. Out: named numbers. None of them is a score:
a copy of the source preserves everything. They show how a merge fails.
Read metrics.py first (`measure`: one image), then collapse.py (`measure_set`: all images of a model).
"""
