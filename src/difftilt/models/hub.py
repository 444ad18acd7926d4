"""From a local folder or an id on the hub to what is in it, with one line said where that fails."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

from safetensors import SafetensorError

from difftilt.errors import UserError

T = TypeVar("T")

FAILURES = (OSError, ValueError, LookupError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
"""What the client of the hub (system errors, all of them) and readers of configurations and weights raise."""


def from_hub(
    what: str, source: str, read: Callable[[str], T], parts: int = 2, also: tuple[type[Exception], ...] = ()
) -> T:
    """What ``read`` makes of a source.

    Args:
        what: is read, the first word of the message.
        source: local path, or an id on the hub.
        read: a reader of ``diffusers``, ``transformers`` or ``huggingface_hub``; it is given the path or the id.
        parts: of an id: OWNER/NAME, or 3 for OWNER/NAME/FILE.
        also: further errors that ``read`` raises.

    Raises:
        UserError: in one line, for what is not there, cannot be read, or cannot be reached.
    """
    local, kind = Path(source).expanduser(), "folder" if parts == 2 else "file"
    if not local.exists() and source.count("/") != parts - 1:
        form = "OWNER/NAME" if parts == 2 else "OWNER/NAME/FILE"
        raise UserError(f"{what} {source!r} is neither a {kind} nor an id on the hub, which is {form}")
    try:
        return read(str(local) if local.exists() else source)
    except (*FAILURES, *also) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "is the file complete?" if local.exists() else f"no network? name a local {kind}"
        raise UserError(f"{what} {source!r} cannot be loaded: {reason[:300]}; {remedy}") from error
