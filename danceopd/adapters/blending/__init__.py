"""The parts of `danceopd.adapters.blend`: its methods, the layers that have weights of their own, and the report.

Start with `methods.py`, which lists the methods: sums of factors there, entry by entry in `entries.py`, on singular
vectors in `subspace.py`. `layers.py` says which weights hold in a layer, `conflict.py` where adapters fight.
"""
