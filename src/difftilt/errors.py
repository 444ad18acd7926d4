"""Errors a user can cause, each with the exit code of the command line.

The message names the thing, the value and the remedy.
"""


class UserError(ValueError):
    """Something in the configuration, the files or the combination of parts is wrong."""

    exit_code = 2


class RewardError(RuntimeError):
    """A reward raised, or returned something that is not a score for each sample."""

    exit_code = 3


class GuardError(RuntimeError):
    """Something that theory promises does not hold in this run (a ratio that is not one, a term without gradient)."""

    exit_code = 4
