"""A real world that ships as a data step: OpenMoji's layered drawings, composed into exact pictures.

`fetch` takes the npm package `openmoji` (graphics CC BY-SA 4.0) into the user's cache, checked against a pinned
checksum; nothing of it is part of danceopd. `kinds` names what the drawings are; `drawings` rasters their layers,
`render` composes scenes of 512 pixels; `tasks` draws prompts and edits with exact targets; `read` says what a picture
shows, by matching the known drawings; `score` turns that into facts. The scene graph, GenEval's records and the facts
about edits are those of `danceopd.scenes`, in the same unit: a picture is 64 units wide, whatever its pixels.
"""
