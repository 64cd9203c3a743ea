"""What differs between model families: one file for each, a `Family` or a few in it, listed in ../registry.py.

`sd3.py` is the shortest; docs/bring-your-own-model.md writes one step by step.
"""
