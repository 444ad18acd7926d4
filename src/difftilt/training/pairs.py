"""Preference pairs: a prompt, the sample that was preferred, and the one that was not.

A sample is the path of an image, an image of a data set, a list of tokens, or a text that the testbed can read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Shaped
from PIL import Image
from pydantic import Field
from torch import Tensor

from difftilt.config import Config, Problems
from difftilt.errors import UserError, quoted
from difftilt.models.diffusers.known import IMAGE, PICTURES
from difftilt.models.protocol import GenerativeModel
from difftilt.process.protocol import Condition
from difftilt.rewards.pictures import ENDINGS, as_image, read_image
from difftilt.rewards.prompts import TEXT, Prompt
from difftilt.rewards.protocol import Samples
from difftilt.rewards.reference import image_shape
from difftilt.training.datasets import rows_of_dataset
from difftilt.training.experience import Experience
from difftilt.training.jsonl import rows_of_jsonl
from difftilt.training.offline import no_edges
from difftilt.training.prompts import check_prompt
from difftilt.training.protocol import Task

Member = Tensor | Path | Image.Image | str
"""Tokens, the file of an image, an image, or a text."""
Read = Callable[[Sequence[str]], Tensor]
"""Texts -> tokens."""


class PairSource(Config):
    """A file or a data set of pairs, and which of its columns are meant."""

    source: str = Field(min_length=1)
    """A ``.jsonl`` or ``.parquet`` file, a folder of them, what ``save_to_disk`` wrote, or an id on the hub."""
    prompt: str = Field(default=TEXT, min_length=1)
    """Column of the text."""
    chosen: str = Field(default="chosen", min_length=1)
    """Column of the sample that was preferred."""
    rejected: str = Field(default="rejected", min_length=1)
    """Column of the other."""
    metadata: tuple[str, ...] = ()
    """Columns that rewards see as metadata of the prompt."""
    split: str | None = Field(default=None, min_length=1)
    """Of a data set; it may be left out where there is only one."""
    subset: str | None = Field(default=None, min_length=1)
    """Of a data set on the hub that has several."""


@dataclass(frozen=True)
class Pair:
    """One preference.

    Attributes:
        where: it stands in its source.
        prompt: with its metadata.
        chosen: preferred.
        rejected: not preferred.
    """

    where: str
    prompt: str
    chosen: Member
    rejected: Member


def read_pairs(source: str | Path | Mapping[str, Any] | PairSource) -> list[Pair]:
    """All pairs of a source. Paths are relative to the file that names them; images are opened when they are needed.

    Raises:
        UserError: for a source that cannot be read or is empty, and with everything that is wrong in it.
    """
    source, problems = _parsed(source), Problems()
    path = Path(source.source).expanduser()
    columns = [source.prompt, source.chosen, source.rejected, *source.metadata]
    is_file = path.suffix == ".jsonl" and not path.is_dir()
    if is_file and (source.split or source.subset):
        raise UserError(f"pairs {source.source!r}: split and subset belong to a data set, and this is a file")
    rows = rows_of_jsonl(path) if is_file else rows_of_dataset(source.source, source.split, source.subset, columns)
    folder, found = path if path.is_dir() else path.parent, list[Pair]()
    for where, row, wrong in rows:
        absent = [name for name in columns if row.get(name) is None]
        if wrong is None and absent:
            there, names = ", ".join(map(repr, row)) or "no keys", ", ".join(map(repr, absent))
            wrong = f"{names} {'is' if len(absent) == 1 else 'are'} missing, there are {there}"
        if wrong is None:
            found.append(_pair(source, where, row, folder, problems))
        else:
            problems.add(f"{where}: {wrong}")
    problems.check(source.source)
    if not found:
        raise UserError(f"pairs {source.source!r} hold none: write one JSON object per line, with {', '.join(columns)}")
    return found


def _parsed(source: str | Path | Mapping[str, Any] | PairSource) -> PairSource:
    if isinstance(source, PairSource):
        return source
    problems = Problems()
    values = source if isinstance(source, Mapping) else {"source": str(source)}
    parsed = problems.parse(PairSource, values, "pairs")
    problems.check("pairs")
    return cast(PairSource, parsed)


def _pair(source: PairSource, where: str, row: Mapping[str, Any], folder: Path, problems: Problems) -> Pair:
    text = row[source.prompt]
    if not isinstance(text, str):
        problems.add(f"{where}: {source.prompt!r} is {text!r:.60}, not a text")
    prompt = Prompt(str(text), {name: row[name] for name in source.metadata})
    check_prompt(where, prompt, problems)
    chosen, rejected = (
        _member(f"{where}: {name!r}", row[name], folder, problems) for name in (source.chosen, source.rejected)
    )
    if _kind(chosen) != _kind(rejected):
        problems.add(f"{where}: {_kind(chosen)} is compared with {_kind(rejected)}")
    return Pair(where, prompt if source.metadata else str(text), chosen, rejected)


def _member(where: str, value: object, folder: Path, problems: Problems) -> Member:
    """One sample as it stands in the source."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, list):
        tokens = cast(list[object], value)
        if tokens and all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
            return torch.tensor(cast(list[int], tokens))
        problems.add(f"{where} is a list, but not of whole numbers: tokens are")
        return ""
    if not isinstance(value, str):
        problems.add(f"{where} is {value!r:.60}: name the file of an image, or give tokens or a text")
        return ""
    if Path(value).suffix.lower() not in ENDINGS:
        return value
    file = folder / Path(value).expanduser()
    if not file.is_file():
        problems.add(f"{where}: there is no image {file}")
    return file


def _kind(member: Member) -> str:
    if isinstance(member, Tensor):
        return f"{len(member)} tokens"
    return "a text" if isinstance(member, str) else "an image"


def media_of(
    members: Sequence[Member], read: Read | None = None, shape: tuple[int, int, int] | None = None
) -> list[Shaped[Tensor, "..."]]:
    """Samples as a reward sees them: images in [0, 1], tokens int64.

    Args:
        members: of one kind.
        read: texts -> tokens.
        shape: of all images; None leaves their size.

    Raises:
        UserError: for texts that nothing reads, and a file that is no image.
    """
    texts = [member for member in members if isinstance(member, str)]
    if texts and read is None:
        raise UserError(
            f"{texts[0]!r:.60} is a text, and nothing here turns texts into tokens: give tokens, or name a recipe "
            f"whose testbed reads them; images end in {', '.join(ENDINGS)}"
        )
    tokens = iter(cast(Read, read)(texts) if texts else ())

    def medium(member: Member) -> Tensor:
        if isinstance(member, Tensor):
            return member
        if isinstance(member, str):
            return next(tokens)
        return read_image(member, shape) if isinstance(member, Path) else as_image(member, shape)

    return [medium(member) for member in members]


def in_batches(
    pairs: Iterable[Pair],
    batch: int,
    read: Read | None = None,
    encode: Callable[[Sequence[str]], Condition] | None = None,
) -> Iterator[tuple[Samples, Samples]]:
    """Chosen and rejected samples, as many pairs at once as follow one another in one shape, at most ``batch``.

    Raises:
        UserError: as :func:`media_of`, and for a pair of images of two sizes; names the pair.
    """
    for one in _chunks(pairs, batch):
        columns = [media_of([getattr(pair, side) for pair in one], read) for side in ("chosen", "rejected")]
        loaded = list(zip(one, *columns, strict=True))
        for pair, chosen, rejected in loaded:
            if chosen.shape != rejected.shape:
                raise UserError(
                    f"{pair.where}: the samples are of sizes {tuple(chosen.shape)} and {tuple(rejected.shape)}: bring "
                    "them to one"
                )
        for _, same in groupby(loaded, key=lambda row: row[1].shape):
            rows = list(same)
            prompts, group = [pair.prompt for pair, _, _ in rows], torch.arange(len(rows))
            condition = None if encode is None else encode(prompts)
            yield (
                Samples.of(torch.stack([row[1] for row in rows]), prompts, group, condition),
                Samples.of(torch.stack([row[2] for row in rows]), prompts, group, condition),
            )


def _chunks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    held: list[Pair] = []
    for pair in pairs:
        held.append(pair)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def groups_of(task: Task, pairs: Sequence[Pair]) -> Experience:
    """Pairs as groups of two with the scores 1 and 0, in the latents of the task's model: data for offline methods.

    With the ranking alone (gdro with tau 0 and gamma 0) this is the loss of Diffusion-DPO (Wallace et al. 2023, arXiv
    2311.12908, equation 14), whose pairs need not be samples of the model either.

    Raises:
        UserError: for a model without a way into its latent space, media it has none for, or prompts that are no
            training prompts of the task.
    """
    model = task.model
    if model.latents is None:
        raise UserError(f"{task.name} has no way from media to latents, so no pairs can be learned from")
    places = _places(task.prompts, pairs)
    strange = [pair for pair, place in zip(pairs, places, strict=True) if place is None]
    if strange:
        raise UserError(
            f"{len(strange)} of {len(pairs)} pairs have prompts that are no training prompts of {task.name!r}, the "
            f"first is {strange[0].where}, {quoted(strange[0].prompt)}: name the file of pairs as prompts as well"
        )
    members = [member for pair in pairs for member in (pair.chosen, pair.rejected)]
    prompt = torch.tensor([place for place in places if place is not None]).repeat_interleave(2)
    rows = torch.arange(len(members))
    score = (rows % 2 == 0).float()
    # conditions are encoded when a group has its turn
    return Experience(rows, rows // 2, prompt, None, _latents(model, members), score, {"preferred": score}, no_edges())


def _places(prompts: Sequence[str], pairs: Sequence[Pair]) -> list[int | None]:
    """For each pair the first prompt of its text and of the metadata that it names; None where there is none.

    Raises:
        UserError: where prompts with several images have the text of a pair that does not say which is meant.
    """
    alike: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        alike.setdefault(str(prompt), []).append(place)
    found: list[int | None] = []
    for pair in pairs:
        own = _metadata(pair.prompt)
        fits = [place for place in alike.get(str(pair.prompt), ()) if own.items() <= _metadata(prompts[place]).items()]
        seen = {tuple(str(_metadata(prompts[place]).get(name)) for name in PICTURES) for place in fits}
        if len(seen) > 1:
            raise UserError(
                f"{pair.where}, {quoted(pair.prompt)}: {len(seen)} training prompts read so, with other images: "
                f"name the column {IMAGE!r} of the pairs in their metadata"
            )
        found.append(fits[0] if fits else None)
    return found


def _metadata(prompt: str) -> Mapping[str, Any]:
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def _latents(model: GenerativeModel, members: Sequence[Member], batch: int = 32) -> Tensor:
    """On the CPU; of images brought to the size of the model's own."""
    assert model.latents is not None
    shape = image_shape(model, "the pairs hold images") if not isinstance(members[0], Tensor) else None
    parts = [members[first : first + batch] for first in range(0, len(members), batch)]
    with torch.no_grad():
        return torch.cat([model.latents(torch.stack(media_of(part, None, shape))).cpu() for part in parts])
