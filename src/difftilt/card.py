"""The literal card that every leaf begins with, and how leaves are found: by their files, without importing them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a leaf (a method, steerer, reward, model or testbed) says of itself; literals only.

    Attributes:
        name: the slug; the file has the same name with ``_`` for ``-``.
        entry: name of the class or function in the file that the name stands for.
        paper: citation with the arXiv number, or a sentence where there is no paper.
        needs: what the task must offer, e.g. ``("gaussian process",)``; checked before any work.
        laws: invariances that ``difftilt check`` holds the leaf to: ``ratio_one``, ``constant_reward``,
            ``offset_per_prompt``, ``batch_split``.
    """

    name: str
    entry: str
    paper: str
    needs: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()
