"""Steerers against bare forwards of the very batches that they make, and those that branch or prune among them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.paired import Subject
from benchmarks.workload import NetworkClock, Size, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.steering.dlbs import DLBS, DLBSConfig
from difftilt.steering.protocol import Steered, Steerer
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.steering.ttsnap import TTSnap, TTSnapConfig
from difftilt.training.protocol import Task


def svdd_overhead(size: Size) -> Subject:
    """SVDD of one prompt, every child valued by the reward of its x0-prediction."""
    parents = max(size.batch // 8, 1)
    steerer = SVDD(SVDDConfig(particles=parents, children=size.batch // parents, temperature=0.1))
    words = f"SVDD of one prompt, {parents} samples, {steerer.config.children} children each, {size.steps} steps"
    return _subject("svdd", size, make_task(size), steerer, words)


def dlbs_overhead(size: Size) -> Subject:
    """Beam search of one prompt, every candidate scored after a lookahead of six evaluations."""
    beams = max(size.batch // 8, 1)
    steerer = DLBS(DLBSConfig(particles=beams, children=size.batch // beams))
    words = (
        f"DLBS of one prompt, {beams} beams, {steerer.config.children} children each, lookahead "
        f"{steerer.config.lookahead}, {size.steps} steps"
    )
    return _subject("dlbs", size, make_task(size), steerer, words)


def ttsnap_overhead(size: Size) -> Subject:
    """Pruned best-of-n of one prompt by a noise-aware reward, which is fitted before the clock starts."""
    size = replace(size, steps=20)
    task = make_task(size)
    config = TTSnapConfig(
        particles=size.batch, images=2, validation_images=2, warm_up_epochs=1, epochs=1, first_level=11
    )
    steerer = TTSnap(config)
    steerer.fit_for(task, denoiser(task.model), task.reward, ["3"], Noise(1))
    sizes = steerer.schedule(size.steps).sizes(size.batch)
    words = f"TTSnap of one prompt, {' → '.join(map(str, sizes))} candidates, {size.steps} steps, noise-aware"
    return _subject("ttsnap", size, task, steerer, words)


def _subject(name: str, size: Size, task: Task, steerer: Steerer, words: str) -> Subject:
    """A call for one of the classes of the benchmarks' network."""
    inputs, network = make_inputs(size), task.model.network
    assert isinstance(network, torch.nn.Module)
    search = Search(task, steerer, "3", lambda count: (inputs.x_t[:count], inputs.t[:count], inputs.label[:count]))
    return search.subject(name, words, shapes_of(size, network))


@dataclass(frozen=True)
class Search:
    """A search with one prompt, and what the network is called with where nothing is searched.

    Attributes:
        inputs: rows -> arguments of the network.
    """

    task: Task
    steerer: Steerer
    prompt: str
    inputs: Callable[[int], tuple[Tensor, ...]]

    def steered(self) -> Steered:
        model = denoiser(self.task.model)
        return self.steerer.steer(self.task, model, self.task.reward, [self.prompt], Noise(0))

    def subject(self, name: str, words: str, shapes: Mapping[str, object]) -> Subject:
        """The search against forwards with the same numbers of rows."""
        network, rows, inside = self.task.model.network, list[int](), list[float]()
        assert isinstance(network, torch.nn.Module)
        clock = NetworkClock(network)
        handle = network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        spent = self.steered().ledger
        handle.remove()
        assert sum(rows) == spent.nfe

        def program() -> Steered:
            clock.read()
            outcome = self.steered()
            inside.append(clock.read())
            return outcome

        def floor() -> None:
            with torch.no_grad():
                for count in rows:
                    network(*self.inputs(count))

        return Subject(
            name=name,
            bound=1.10,
            program=words,
            floor=f"{len(rows)} forwards of the same network with the same numbers of rows, without gradient",
            run_program=program,
            run_floor=floor,
            shapes=shapes,
            extra={"nfe": spent.nfe, "network_calls": len(rows), "reward_calls": spent.reward_calls},
            phases={"network": inside},
        )
