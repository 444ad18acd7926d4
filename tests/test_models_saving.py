"""Saved and loaded networks are equal bit for bit; damaged files are named, with a remedy."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from difftilt.errors import UserError
from difftilt.models import from_pretrained, save_pretrained
from difftilt.models.saving import CLASSES, CONFIG, WEIGHTS

CONFIGS: Mapping[str, dict[str, object]] = {
    "DiT": {"channels": 1, "size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "classes": 3},
    "MLP": {"inputs": 3, "classes": 2},
    "MarkovPosterior": {"initial": [0.3, 0.7], "transition": [[0.9, 0.1], [0.2, 0.8]], "length": 3},
    "MaskedTransformer": {"vocab": 4, "length": 5, "width": 16, "depth": 1, "heads": 2},
    "MixtureVelocity": {"means": [[0.0, 1.0], [2.0, 0.1]], "std": 0.3, "weights": [0.4, 0.6], "classes": [0, 1]},
    "ProcessReward": {"shape": [1, 8, 8], "classes": 3, "hidden": 8},
    "TextEncoder": {"vocabulary": ["red", "circle"], "length": 3, "width": 16, "depth": 1, "heads": 2},
}


def make(name: str) -> nn.Module:
    network = CLASSES[name](**CONFIGS[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = make(name).to(dtype)
    save_pretrained(network, tmp_path / "deep" / "er", CONFIGS[name])
    again = from_pretrained(tmp_path / "deep" / "er")
    saved, loaded = network.state_dict(), again.state_dict()
    assert type(again) is type(network)
    assert saved.keys() == loaded.keys()
    assert all(saved[key].dtype == loaded[key].dtype and torch.equal(saved[key], loaded[key]) for key in saved)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in network.parameters()]
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == [CONFIG, WEIGHTS]


def test_a_variance_preserving_mixture_comes_back(tmp_path: Path) -> None:
    config = {**CONFIGS["MixtureVelocity"], "process": {"alphas_cumprod": [0.9, 0.5, 0.1]}}
    network = CLASSES["MixtureVelocity"](**config)
    save_pretrained(network, tmp_path, config)
    x_t, t, label = torch.ones(2, 2), torch.tensor([0.4, 0.8]), torch.tensor([0, 2])
    assert torch.equal(from_pretrained(tmp_path)(x_t, t, label), network(x_t, t, label))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_pretrained(make("MLP"), tmp_path, CONFIGS["MLP"])
    return tmp_path


def rewrite(saved: Path, **changes: object) -> None:
    record = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**record, **changes}))


def refused(saved: Path, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        from_pretrained(saved)
    for word in words:
        assert word in str(raised.value)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    refused(saved, WEIGHTS, "missing", "restore")
    (saved / CONFIG).unlink()
    refused(saved, CONFIG, "missing", "save_pretrained")
    refused(saved / "nowhere", "nowhere", "missing")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_weights_are_noticed(saved: Path, damage: str) -> None:
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (saved / WEIGHTS).write_bytes({"flip": bytes(data), "cut": bytes(data[:100]), "empty": b""}[damage])
    refused(saved, WEIGHTS, "damaged", "save again")


def test_damaged_or_strange_configs_are_named(saved: Path) -> None:
    rewrite(saved, **{"class": "os.system"})
    refused(saved, CONFIG, "'os.system'", "known are DiT")
    rewrite(saved, **{"class": "MLP", "config": {"inputs": 3, "nonsense": 1}})
    refused(saved, CONFIG, "nonsense")
    rewrite(saved, config={"inputs": 4, "classes": 2})
    refused(saved, WEIGHTS, "does not hold the weights")
    (saved / CONFIG).write_text('{"class": "MLP"}')
    refused(saved, CONFIG, "lacks")
    (saved / CONFIG).write_text("[1, 2]")
    refused(saved, CONFIG, "lacks")
    (saved / CONFIG).write_bytes(b'{"class": "M\xff')
    refused(saved, CONFIG, "cannot be read as JSON")


def test_files_that_are_not_safetensors_are_refused(saved: Path) -> None:
    import hashlib

    (saved / WEIGHTS).write_bytes(b"not a tensor file")
    rewrite(saved, sha256=hashlib.sha256(b"not a tensor file").hexdigest())
    refused(saved, WEIGHTS, "cannot be read as safetensors")
    save_file({"other": torch.zeros(1)}, saved / WEIGHTS)
    rewrite(saved, sha256=hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest())
    refused(saved, WEIGHTS, "does not hold the weights")


def test_a_config_that_makes_another_network_is_refused_on_saving(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not make the network"):
        save_pretrained(make("MLP"), tmp_path, {"inputs": 5})
    with pytest.raises(UserError, match="unknown class 'Linear'"):
        save_pretrained(nn.Linear(2, 2), tmp_path, {})
    assert not list(tmp_path.iterdir())
