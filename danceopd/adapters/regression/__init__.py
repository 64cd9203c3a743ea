"""Blending by regression: what a layer's inputs are goes in, the LoRA whose outputs on them are closest comes out.

`moments.py` is what is kept of the inputs, `methods.py` the papers' formulas, `recorder.py` sees the inputs of layers
during a forward. Which forwards those are is `danceopd.engine.calibration`'s.
"""
