"""Objective nft: the student's own samples, ranked by frozen rewards, as what it learns from (DiffusionNFT, arXiv
2509.16117).

`hook.py` draws and ranks them (the loss is `engine/objectives.py`, the rewards are `../rewards/`), `skills.py` and
`contexts.py` look back at them, `cost.py` counts their forwards. Read `hook.py` first.
"""
