"""The prompt bank of `data: auto`: prompts and edits of our own, for a merge whose user has no data.

`build.py` makes it of the words in `words.txt` and the hand-written lines of `written.txt`; `rows.py` has it as
training data, and says which sources of edits are to be drawn before training.
"""
