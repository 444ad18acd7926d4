"""Files of prompts: one per line."""

from collections.abc import Mapping
from pathlib import Path

from difftilt.errors import UserError


def read_prompts(file: str) -> Mapping[int, str]:
    """Line number -> prompt; empty lines and lines that begin with ``#`` are left out.

    Raises:
        UserError: for a file that cannot be read, or holds no prompt.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"prompts {file!r} cannot be read as a file ({reason}): name a text file with one prompt per line, or give "
            "the prompts as a list"
        ) from error
    stripped = {number: line.strip() for number, line in enumerate(text.splitlines(), start=1)}
    prompts = {number: line for number, line in stripped.items() if line and not line.startswith("#")}
    if not prompts:
        raise UserError(f"prompt file {file} holds no prompt: write one per line; lines with # in front are comments")
    return prompts
