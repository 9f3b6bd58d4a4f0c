"""The exception whose message is written for the user."""


class UserError(Exception):
    """Bad input: what is wrong, where, and how to mend it, in one line.

    Entry points print the message on standard error and exit with code 2. Any other exception is a bug in harmony and
    keeps its traceback.
    """
