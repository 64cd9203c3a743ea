"""Coloured shapes on a background, drawn at 64 pixels: a world in which every prompt and edit can be scored exactly.

`grammar` says what a scene is and which split it belongs to; `prompts` and `edits` draw tasks from it in the categories
of GenEval and GEdit, and `paraphrase` rewords them. `render` draws a scene, `read` finds the scene in a picture, and
`score` compares the two with facts (`facts`). Start with `grammar.py`.
"""
