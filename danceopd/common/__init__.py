"""Helpers that know no model: files, the cache folder, messages, the terminal, devices, processes, random numbers.

Every other room may import from here, and nothing here imports from another room. Errors that a user can mend are
`danceopd.errors.UserError`: one sentence that says what is wrong, where, and how to mend it.
"""
