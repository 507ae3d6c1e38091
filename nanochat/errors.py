"""The two ways in which a command can fail for a reason that its user can mend.

A message names the value that was refused, the limit it broke, and the remedy. The command line prints it without a
traceback; anything else that escapes is a bug and keeps its traceback.
"""


class NanochatError(Exception):
    """A run failed: missing or damaged input, full disk, loss not finite. Exit code 1."""

    exit_code = 1


class UsageError(NanochatError):
    """A command was called wrongly: unknown value, sizes that do not fit together. Exit code 2."""

    exit_code = 2
