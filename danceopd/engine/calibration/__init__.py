"""Inputs of the layers of a blend: adapters and a few of their rows go in, what their regressions need comes out.

`states.py` rolls each teacher out on its own rows; `inputs.py` runs the network on those states and keeps the moments
of its layers' inputs, some layers at a time.
"""
