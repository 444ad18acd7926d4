"""Weights by role, as copies of the network: what is simple, and what small models want."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.leaves import nearest
from difftilt.models.protocol import Frozen, Lagging, Network, RoleSpec, Weights
from difftilt.models.shards import local, put, whole


@dataclass
class Held:
    """One role: a module, the version of its weights, and whether an optimiser may move them."""

    module: nn.Module
    version: int
    trained: bool

    @property
    def network(self) -> Network:
        """What evaluates with these weights."""
        return self.module

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is the role's own and is saved, by name."""
        return self.module.state_dict()

    def weights(self) -> set[str]:
        """Names of the tensors that are parameters; the others are buffers."""
        return {name for name, _ in self.module.named_parameters(remove_duplicate=False)}

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those with gradients, in the order of the module; none for frozen and lagging roles."""
        return tuple(p for p in self.module.parameters() if p.requires_grad)

    def copy(self, role: str, version: int, like: "Held | None" = None) -> "Held":
        """The same weights for another role: trained exactly where ``like`` is, frozen if that is None."""
        copied = _frozen(deepcopy(self.module))
        if like is not None:
            trainable = {name for name, value in like.module.named_parameters() if value.requires_grad}
            for name, parameter in copied.named_parameters():
                parameter.requires_grad_(name in trainable)
        return Held(copied, version, trained=like is not None)

    def assembled(self, keep: bool = True) -> "Held":
        """The same where every tensor is whole; all processes that hold parts call it together."""
        return self

    def lora(self) -> dict[str, Any] | None:
        """Settings of the adapter that these weights are; None for whole networks."""
        return None

    def changed(self) -> None:
        """Called when the tensors of a role that no optimiser moves have been written to."""

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are saved beside the roles, and must be the same where they are loaded."""
        return {}


class CopiedRoles:
    """Implements ``Roles`` with one copy per role of what is trained: the network, or an adapter on it.

    ``current`` is the network itself, ``reference`` a frozen copy of it as it is now; the declared roles follow in
    their order. A role that brings a network of its own holds that very module. Roles that start as copies keep the
    precision and the training flag of their source; frozen and lagging ones have gradients switched off.

    Every role carries a version number. Copying hands on the number and ``stepped`` takes a new one, so ``same`` is
    known without looking at weights. With :func:`~difftilt.models.lora.adapted` the copies are adapters on one
    backbone, and blending, versions and the saved state are those of adapter weights.

    Args:
        network: role ``current``; moved in place by its optimiser.
        specs: further roles by name.

    Raises:
        UserError: if a name is taken, a source is unknown or comes later, or a trained role has nothing to start from.
    """

    def __init__(self, network: nn.Module | Held, specs: Mapping[str, RoleSpec] | None = None) -> None:
        self._versions: Iterator[int] = count(1)
        first = network if isinstance(network, Held) else Held(network, 0, trained=True)
        self._held: dict[str, Held] = {"current": first, "reference": first.copy("reference", first.version)}
        for name, spec in (specs or {}).items():
            if name in self._held:
                raise UserError(f"role {name!r} exists already: current and reference are always there")
            self._held[name] = self._make(name, spec)

    def _make(self, name: str, spec: RoleSpec) -> Held:
        trained = not isinstance(spec, Frozen | Lagging)
        if not isinstance(spec, Lagging) and spec.network is not None:
            module = spec.network if trained else _frozen(spec.network)
            return Held(module, next(self._versions), trained)
        if spec.source is None:
            raise UserError(f"role {name!r} has neither a source nor a network of its own: give one of them")
        source = self._role(spec.source, f"the source of role {name!r}")
        # a copy of a frozen role must be trainable again, exactly where the network itself is
        return source.copy(name, source.version, self._held["current"] if trained else None)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._held)

    def _role(self, role: str, what: str = "the role") -> Held:
        if role in self._held:
            return self._held[role]
        raise UserError(f"{what} is unknown: {role!r}; {nearest(role, self._held)}")

    def network(self, role: str) -> Network:
        return self._role(role).network

    def module(self, role: str) -> nn.Module:
        return self._role(role).module

    def parameters(self, role: str) -> Sequence[nn.Parameter]:
        """Those with gradients, in a fixed order; none for frozen and lagging roles."""
        return self._role(role).parameters()

    def held(self, role: str) -> Weights:
        """The weights of a role, to be written down."""
        return self._role(role)

    def stepped(self, role: str) -> None:
        held = self._role(role)
        if not held.trained:
            raise UserError(f"role {role!r} is frozen or lagging: no optimiser may move it")
        held.version = next(self._versions)

    def blend(self, role: str, source: str, decay: float) -> None:
        """``role <- decay·role + (1 - decay)·source`` for parameters; buffers (statistics, tables) are copied.

        Blending equal weights changes no bit. The arithmetic is in float32 or better.

        Raises:
            UserError: if the two hold different networks, or decay is outside [0, 1].
        """
        target, origin = self._role(role), self._role(source)
        if not 0 <= decay <= 1:
            raise UserError(f"decay must be between 0 and 1, got {decay}")
        if target.version == origin.version or decay == 1:
            return
        mine, theirs = target.tensors(), origin.tensors()
        if {key: value.shape for key, value in mine.items()} != {key: value.shape for key, value in theirs.items()}:
            raise UserError(f"roles {role!r} and {source!r} hold different networks: they cannot be blended")
        parameters = target.weights()
        with torch.no_grad():
            for key, value in mine.items():
                keep = decay if key in parameters else 0.0
                own, other = local(value), local(theirs[key])
                own.copy_(other if keep == 0 else _blended(own, other, keep))
        target.version = origin.version if decay == 0 else next(self._versions)
        target.changed()

    def same(self, role: str, other: str) -> bool:
        return self._role(role).version == self._role(other).version

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Copies of all tensors of all roles, whole also where the processes hold them in parts.

        Args:
            keep: False only takes part in making them whole, for another process.
        """
        return whole(self._constants() | self._tensors(), keep)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back every tensor; roles whose tensors are then equal bit for bit count as the same.

        Raises:
            UserError: if the tensors are not exactly those of these roles; nothing is changed then.
        """
        constants, expected = self._constants(), self._tensors()
        known = constants | expected
        missing, surplus = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
        if missing or surplus:
            raise UserError(f"the saved roles do not fit: missing {missing[:3]}, not expected {surplus[:3]}")
        for key, value in known.items():
            if (value.shape, value.dtype) != (state[key].shape, state[key].dtype):
                raise UserError(
                    f"saved tensor {key!r} is {tuple(state[key].shape)} {state[key].dtype}, "
                    f"expected {tuple(value.shape)} {value.dtype}"
                )
        for key, value in constants.items():
            if not torch.equal(value, state[key].to(value.device)):
                raise UserError(f"the saved roles are adapters on another base model ({key} differs): load that one")
        with torch.no_grad():
            for key, value in expected.items():
                put(value, state[key])
        self._recognise(state)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{role}/{key}": value for role, held in self._held.items() for key, value in held.tensors().items()}

    def _constants(self) -> dict[str, Tensor]:
        return self._held["current"].constants()

    def _recognise(self, state: Mapping[str, Tensor]) -> None:
        """Number the versions anew: equal tensors, equal number. Exact, so done once after loading only.

        Told from what was loaded: of tensors in parts every process holds other slices, and all must agree.
        """
        seen: list[str] = []
        for role, held in self._held.items():
            twin = next((other for other in seen if self._equal(role, other, state)), None)
            held.version = next(self._versions) if twin is None else self._held[twin].version
            held.changed()
            seen.append(role)

    def _equal(self, role: str, other: str, state: Mapping[str, Tensor]) -> bool:
        """Whether two roles hold networks of one kind and have been given the same tensors."""
        mine, theirs = ({key: state[f"{name}/{key}"] for key in self._held[name].tensors()} for name in (role, other))
        return (
            type(self._held[role].module) is type(self._held[other].module)
            and mine.keys() == theirs.keys()
            and all(value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]) for key, value in mine.items())
        )


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _blended(mine: Tensor, theirs: Tensor, decay: float) -> Tensor:
    wide = torch.promote_types(mine.dtype, torch.float32)
    return torch.lerp(theirs.to(mine.device, wide), mine.to(wide), decay).to(mine.dtype)
