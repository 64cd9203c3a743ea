"""Synthetic worlds in which the right answer can be computed: a prompt or an edit goes in, a score comes out.

`scenes` draws coloured shapes of 64 pixels, `openmoji` composes OpenMoji's drawings at 512 pixels. Each can draw a
scene, read a picture back into a scene, and compare the two. `toy` trains the small model that ships with the package
on `scenes`. Start with `scenes/grammar.py`.
"""
