"""A finished run on the Hugging Face Hub: which files, in which words, and the upload.

`files.py` chooses and writes them into a folder of their own, `push.py` uploads that folder. Read `files.py` first.
"""
