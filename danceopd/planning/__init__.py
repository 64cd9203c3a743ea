"""What a merge will take, found before anything is loaded, and the settings that follow from it.

In: a recipe and a card. Out: everything that a merge would refuse, refused now; the memory of each part of a run, the
time of an update, and values for what the recipe leaves to `auto`. Only configurations and headers of safetensors files
are read. Read `outline.py` first (the run without its weights), then `memory.py` and `settings.py`.
"""
