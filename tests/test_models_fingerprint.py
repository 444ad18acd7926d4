"""A fingerprint tells models apart that were trained apart, at a cost that does not grow with them."""

from unittest.mock import patch

import torch
from torch import nn

from difftilt.models.fingerprint import READ, fingerprint


class Weights(nn.Module):
    """Tensors of a few sizes, the largest of 300 × 300 values in bfloat16."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"scale": (), "bias": (300,), "small": (64, 64), "large": (300, 300)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def test_every_tensor_of_a_model_and_every_kind_of_training_shows_in_its_fingerprint() -> None:
    own = fingerprint(Weights())
    assert own == fingerprint(Weights())
    assert own != fingerprint(Weights(torch.float16))
    for name in ("scale", "bias", "small", "large"):
        renamed, cut, moved = Weights(), Weights(), Weights()
        renamed.register_parameter(f"{name}_", nn.Parameter(renamed.get_parameter(name).detach()))
        delattr(renamed, name)
        cut.register_parameter(name, nn.Parameter(cut.get_parameter(name).detach()[None]))
        # one step of training in half precision rounds away most of itself
        value = moved.get_parameter(name).detach()
        changed = (value.float() * (1 + 1e-4) + 1e-4).to(value.dtype)
        if name == "large":
            assert 0.005 < float((changed != value).double().mean()) < 0.5
        else:
            changed.view(-1)[-1] += 1
        moved.register_parameter(name, nn.Parameter(changed))
        assert len({own, fingerprint(renamed), fingerprint(cut), fingerprint(moved)}) == 4, name


def test_a_fingerprint_reads_no_more_of_a_larger_model() -> None:
    hashed = list[int]()

    class Counting:
        def update(self, content: bytes) -> None:
            hashed[-1] += len(content)

        def hexdigest(self) -> str:
            return ""

    for side in (100, 1000):
        hashed.append(0)
        with patch("difftilt.models.fingerprint.hashlib.sha256", Counting):
            fingerprint(nn.Linear(side, side, bias=False))
    # and one letter for the longer shape in either direction
    assert hashed[1] == hashed[0] + 2
    assert READ * 4 < hashed[0] < READ * 4 + 50
