"""Samples and scores as bytes: an npz archive of numbers with JSON inside. Nothing is ever unpickled.

An archive is refused before anything is allocated for it if its entries are compressed, overlap or hold anything but
numbers, so an archive takes no more memory than its bytes.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.lib import format as npy
from torch import Tensor

from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Samples
from difftilt.trees import leaves

FORMAT = 1
"""Of the archives; both ends must agree."""
CONTENT_TYPE = "application/x-npz"
HEADER, ENTRIES = "header", 256
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
Json = dict[str, Any]


class WireError(ValueError):
    """Bytes that are no archive of this format, or values that cannot be put into one."""


def pack(header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> bytes:
    """One archive of a JSON header and tensors of numbers.

    Raises:
        WireError: if the header is not plain JSON.
    """
    narrow = [name for name, tensor in arrays.items() if tensor.dtype == torch.bfloat16]  # numpy has no such numbers
    try:
        text = json.dumps({**header, "bfloat16": narrow}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"only numbers, text, lists and mappings of them can be sent: {error}") from error
    held = {name: tensor.detach().cpu() for name, tensor in arrays.items()}
    values = {name: (held[name].view(torch.int16) if name in narrow else held[name]).numpy() for name in held}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, value in {HEADER: np.frombuffer(text, np.uint8), **values}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                npy.write_array(entry, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def unpack(body: bytes) -> tuple[Json, dict[str, Tensor]]:
    """Inverse of :func:`pack`, for bytes of any origin.

    Raises:
        WireError: for anything else than an archive of this format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            entries = archive.infolist()
            if len(entries) > ENTRIES or sum(entry.file_size for entry in entries) > len(body):
                raise WireError("its entries are larger than itself")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise WireError("its entries are compressed")
            arrays = {entry.filename.removesuffix(".npy"): _array(archive.read(entry)) for entry in entries}
        header = json.loads(arrays.pop(HEADER).tobytes())
    except KeyError as error:
        raise WireError("it has no header") from error
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RecursionError) as error:
        raise error if isinstance(error, WireError) else WireError(f"it cannot be read ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise WireError(f"it is not of format {FORMAT}: both ends need the same version of difftilt")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    narrow = cast(Json, header).get("bfloat16")
    for name in narrow if isinstance(narrow, list) else ():
        if name not in tensors or tensors[name].dtype != torch.int16:
            raise WireError("one of its entries is not the bfloat16 that the header says")
        tensors[name] = tensors[name].view(torch.bfloat16)
    return cast(Json, header), tensors


def _array(content: bytes) -> np.ndarray[Any, Any]:
    """One entry, read by hand: numpy would allocate what the header claims before it looks at the bytes."""
    stream = io.BytesIO(content)
    try:
        shape, columns_first, dtype = READERS[npy.read_magic(stream)](stream)
    except (KeyError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise WireError("one of its entries is no array") from error
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or not dtype.isnative:
        raise WireError(f"one of its entries holds {dtype}, not numbers")
    if prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise WireError("one of its entries has another length than its shape says")
    # a copy: the bytes of a message are read-only, tensors are not
    flat = np.frombuffer(content, dtype, offset=stream.tell()).copy()
    return flat.reshape(shape, order="F" if columns_first else "C")


def pack_samples(samples: Samples, *, condition: bool) -> bytes:
    """Samples, with their condition if asked for.

    Raises:
        WireError: names what cannot be sent.
    """
    arrays = {"media": samples.media, "group": samples.group}
    skeleton = _skeleton(samples.condition, arrays) if condition else None
    header = {
        "format": FORMAT,
        "prompts": list(samples.prompts),
        "used_prompts": list(samples.used_prompts),
        "metadata": {key: list(values) for key, values in samples.metadata.items()},
        "condition": skeleton,
    }
    return pack(header, arrays)


def unpack_samples(body: bytes) -> Samples:
    """Inverse of :func:`pack_samples`, for bytes of any origin.

    Raises:
        WireError: if these are no samples.
    """
    header, arrays = unpack(body)
    try:
        media, group = arrays["media"], arrays["group"]
        condition = _tree(header["condition"], arrays)
        prompts, used, metadata = header["prompts"], header["used_prompts"], header["metadata"]
        samples = Samples(media, prompts, used, group, condition, metadata)
    except (KeyError, TypeError, RecursionError) as error:
        raise WireError(f"it holds no samples: {error} is missing or no field of them") from error
    _check_samples(samples)
    return samples


def _check_samples(samples: Samples) -> None:
    """Every field has one entry for each sample."""
    rows = len(samples.media) if samples.media.ndim > 1 else -1
    texts: list[Any] = [samples.prompts, samples.used_prompts]
    metadata: Any = samples.metadata
    whole = (
        rows > 0
        and samples.group.dtype == torch.int64
        and samples.group.shape == (rows,)
        and all(isinstance(column, list) and len(column) == rows for column in texts)
        and all(isinstance(prompt, str) for column in texts for prompt in column)
        and isinstance(metadata, dict)
        and all(isinstance(column, list) and len(column) == rows for column in metadata.values())
        and all(leaf.ndim > 0 and len(leaf) == rows for leaf in leaves(samples.condition))
    )
    if not whole:
        raise WireError("its samples do not have one medium, group, prompt and entry of metadata each")


def pack_scores(scores: Float[Tensor, " scores"]) -> bytes:
    """Scores as they are, NaN and infinities included."""
    return pack({"format": FORMAT}, {"scores": scores})


def unpack_scores(body: bytes) -> Float[Tensor, " scores"]:
    """Inverse of :func:`pack_scores`, for bytes of any origin.

    Raises:
        WireError: if these are no scores.
    """
    scores = unpack(body)[1].get("scores")
    if scores is None or scores.dtype != torch.float32 or scores.ndim != 1:
        raise WireError("it holds no float32 scores")
    return scores


def _skeleton(tree: Condition, arrays: dict[str, Tensor]) -> Any:
    """The structure of a tree as JSON, its tensors put into ``arrays``."""
    if isinstance(tree, Tensor):
        name = f"condition{len(arrays)}"
        arrays[name] = tree
        return {"array": name}
    if isinstance(tree, Mapping):
        return {"mapping": {str(key): _skeleton(value, arrays) for key, value in cast(Json, tree).items()}}
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_skeleton(value, arrays) for value in cast(Sequence[Any], tree)]}
    if tree is None or isinstance(tree, str | int | float):
        return {"value": tree}
    raise WireError(f"a condition of {type(tree).__name__} cannot be sent: tensors, mappings, lists and numbers can")


def _tree(skeleton: Any, arrays: Mapping[str, Tensor]) -> Condition:
    """Inverse of :func:`_skeleton`."""
    if skeleton is None:
        return None
    items: list[tuple[str, Any]] = [*cast(Json, skeleton).items()] if isinstance(skeleton, dict) else []
    kind, held = items[0] if len(items) == 1 else ("", None)
    if kind == "array":
        return arrays[str(held)]
    if kind == "mapping" and isinstance(held, dict):
        return {key: _tree(value, arrays) for key, value in cast(Json, held).items()}
    if kind in ("tuple", "list") and isinstance(held, list):
        held = [_tree(value, arrays) for value in cast(list[Any], held)]
        return tuple(held) if kind == "tuple" else held
    if kind == "value" and (held is None or isinstance(held, str | int | float)):
        return held
    raise WireError("its condition is no tree of tensors")
