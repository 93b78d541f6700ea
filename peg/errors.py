"""What can go wrong, as a person meets it.

    PegError                 anything this project raises on purpose
    ├── InputError           what was given cannot be used: one line, exit code 2
    └── StageError           a stage could not finish, its work is kept: exit code 1

A message says what was found, what was needed and what to do.
"""


class PegError(Exception):
    """Base of every error that the project raises on purpose."""

    exit_code = 1


class InputError(PegError, ValueError):
    """What the person gave (a parameter, a file, a row) cannot be used as it is."""

    exit_code = 2


class StageError(PegError, RuntimeError):
    """A stage stopped before its outputs were complete; finished work is kept."""
