"""The algorithm: on-policy distillation of routed teachers (DanceOPD, arXiv 2606.27377).

In: a backbone with frozen teachers, their datasets, and parts of the recipe. Out: the student's EMA weights, and
metrics of every update. Read `trainer.py` first, then `batches.py` (what an update samples), `rollout.py` (the
student's trajectories), `velocities.py` (whom an objective may query) and `objectives.py`; `callbacks.py` has the two
places where optional parts plug in.
"""
