"""Networks on disk: ``model.safetensors`` beside ``config.json``. Nothing else is read, and nothing is executed.

``config.json`` holds the name of the class, its arguments, and the SHA-256 of the weights, so that damage is noticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models.dit import DiT
from difftilt.models.markov import MarkovPosterior
from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.mixture import GaussianMixture, MixtureVelocity
from difftilt.models.mlp import MLP
from difftilt.models.process_reward import ProcessReward
from difftilt.models.text_encoder import TextEncoder
from difftilt.process.gaussian import GaussianProcess, RectifiedFlow, VariancePreserving

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def _mixture(
    *,
    means: list[list[float]],
    std: float,
    weights: list[float],
    process: Mapping[str, Any] | str = "rectified_flow",
    classes: list[int] | None = None,
    **rest: Any,
) -> MixtureVelocity:
    mixture = GaussianMixture(torch.tensor(means), std, torch.tensor(weights))
    labels = None if classes is None else torch.tensor(classes)
    return MixtureVelocity(mixture, _process(process), classes=labels, **rest)


def _process(config: Mapping[str, Any] | str) -> GaussianProcess:
    """``"rectified_flow"``, or ``{"alphas_cumprod": [...]}`` for a variance-preserving process."""
    if config == "rectified_flow":
        return RectifiedFlow()
    if isinstance(config, Mapping) and set(config) == {"alphas_cumprod"}:
        return VariancePreserving(torch.tensor(config["alphas_cumprod"], dtype=torch.float64))
    raise UserError(f"unknown process {config!r}: it is 'rectified_flow' or a mapping with 'alphas_cumprod'")


def _markov(*, initial: list[float], transition: list[list[float]], length: int, **rest: Any) -> MarkovPosterior:
    rows = torch.tensor(transition, dtype=torch.float64)
    return MarkovPosterior(torch.tensor(initial, dtype=torch.float64), rows, length, **rest)


CLASSES: Mapping[str, Callable[..., nn.Module]] = {
    "DiT": DiT,
    "MLP": MLP,
    "MarkovPosterior": _markov,
    "MaskedTransformer": MaskedTransformer,
    "MixtureVelocity": _mixture,
    "ProcessReward": ProcessReward,
    "TextEncoder": TextEncoder,
}
"""What ``config.json`` may name: a builder that takes the config's values as keyword arguments."""


def save_pretrained(network: nn.Module, directory: str | Path, config: Mapping[str, Any]) -> None:
    """Write ``network`` so that :func:`from_pretrained` makes it again, bit for bit.

    Args:
        network: of one of the classes in ``CLASSES``.
        directory: made if it is not there; each file is replaced in one move.
        config: keyword arguments of the class, plain JSON values (see the builders of this module for tensors).

    Raises:
        UserError: if the class is not in the table, or the config does not make a network with these weights.
    """
    name = type(network).__name__
    built = _build(name, config, "config")
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if {key: tuple(value.shape) for key, value in built.state_dict().items()} != shapes:
        raise UserError(f"this config of {name} does not make the network that is to be saved: check its values")
    data = save({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()})
    record = {"class": name, "config": dict(config), "sha256": hashlib.sha256(data).hexdigest()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, data)
    _replace(folder / CONFIG, (json.dumps(record, indent=2) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(data)
    os.replace(draft, path)


def from_pretrained(directory: str | Path) -> nn.Module:
    """The network saved in ``directory``, on the CPU.

    Raises:
        UserError: if a file is missing, damaged, or does not fit the other; the message names file and remedy.
    """
    folder = Path(directory)
    record = _record(folder / CONFIG)
    network = _build(record["class"], record["config"], str(folder / CONFIG))
    weights = _weights(folder / WEIGHTS, record["sha256"])
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if {key: tuple(value.shape) for key, value in weights.items()} != expected:
        raise UserError(f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: save the model again")
    # assigned, not copied: a network saved in another precision keeps it
    network.load_state_dict(weights, assign=True)
    return network


def _build(name: str, config: Mapping[str, Any], where: str) -> nn.Module:
    if name not in CLASSES:
        raise UserError(f"{where}: unknown class {name!r}; known are {', '.join(sorted(CLASSES))}")
    try:
        return CLASSES[name](**config)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: the values do not make a {name}: {error}") from error


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a directory written by save_pretrained") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): save the model again") from error
    if not isinstance(record, dict) or not {"class", "config", "sha256"} <= set(cast("dict[str, Any]", record)):
        raise UserError(f"{path} lacks class, config or sha256: save the model again with save_pretrained")
    return cast("dict[str, Any]", record)


def _weights(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; restore it or save again")
        return load(data)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it or save the model again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): save the model again") from error
