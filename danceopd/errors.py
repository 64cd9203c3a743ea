"""The one exception a user meets: a sentence that says what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Bad input. The command line prints the sentence and exits with status 2, without a traceback."""
