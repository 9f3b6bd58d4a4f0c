"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: what is wrong, where, and how to mend it, in one line.

    Entry points print the message on standard error and leave with exit code 2; anything else that is raised is a bug
    of ours and keeps its traceback.
    """
