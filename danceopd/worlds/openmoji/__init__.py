"""OpenMoji's layered drawings composed into pictures of 512 pixels: a world with real drawings that is scored exactly.

`fetch` gets the npm package `openmoji` (graphics CC BY-SA 4.0) into the user's cache, checked against a pinned sha256;
no part of it ships with danceopd. `kinds` lists the classes, `drawings` rasterises their layers, `render` composes
scenes, `tasks` draws prompts and edits, `read` finds the drawings in a picture, and `score` compares the two. Scenes,
records and facts are those of `danceopd.worlds.scenes` in the same unit: a picture is 64 units wide. Start with
`kinds.py`.
"""
