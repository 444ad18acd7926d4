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


def quoted(text: str, most: int = 120) -> str:
    """A text of any origin in quotes: control characters and marks of direction escaped, long ones cut."""
    shown = repr(str(text[: 2 * most]))
    return shown if len(shown) <= most and len(text) <= most else f"{shown[: most - 1]}...{shown[0]}"


def printable(text: str, most: int = 400) -> str:
    """The same without quotes, for tables on a terminal."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:most])
    return shown if len(text) <= most else f"{shown}..."
