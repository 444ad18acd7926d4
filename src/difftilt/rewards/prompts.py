"""Prompts that carry what rewards want to know beside the text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

TEXT = "prompt"
"""Key of the text among the plain values of a prompt."""


class Prompt(str):
    """A text with metadata. It is a text wherever one is wanted, and equal to any text that reads the same.

    Whoever repeats, gathers or splits prompts carries the metadata along, and :meth:`Samples.of` gives it to rewards.

    Args:
        text: what the model sees.
        metadata: plain values as JSON has them, for rewards.
    """

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        made = super().__new__(cls, text)
        made.metadata = dict(metadata or {})
        return made


def plain(prompt: str) -> str | dict[str, Any]:
    """A prompt as recipes and files hold it: its text, or a mapping with ``prompt`` beside the metadata."""
    if isinstance(prompt, Prompt) and prompt.metadata:
        return {TEXT: str(prompt), **prompt.metadata}
    return str(prompt)


def prompt_of(value: str | Mapping[str, Any]) -> str:
    """Inverse of :func:`plain`."""
    if isinstance(value, str):
        return value
    return Prompt(str(value[TEXT]), {name: entry for name, entry in value.items() if name != TEXT})


def identity(prompt: str) -> str:
    """Equal for prompts of equal text and metadata."""
    return json.dumps(plain(prompt), sort_keys=True)


def metadata_of(prompts: Sequence[str]) -> dict[str, Sequence[Any]]:
    """One column for every name that any of the prompts has, one entry for each prompt; None where it has none."""
    known = [cast(Mapping[str, Any], getattr(prompt, "metadata", {})) for prompt in prompts]
    names = dict.fromkeys(name for metadata in known for name in metadata)
    return {name: [metadata.get(name) for metadata in known] for name in names}
