"""`danceopd init`: from the files of a base and its LoRAs to a recipe with comments, and its plan.

`look.py` says what each file is and what it is for, `text.py` writes the recipe, `command.py` asks for what is missing.
"""
