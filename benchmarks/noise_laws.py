"""Learning a law of initial noise: its overhead over the network calls of the samples that it learns from."""

from dataclasses import replace

import torch

from benchmarks.paired import Subject
from benchmarks.workload import NetworkClock, Size, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.steering.find import FIND, FINDConfig
from difftilt.steering.protocol import Steered

ITERATIONS = 3


def find_overhead(size: Size) -> Subject:
    """FIND of one prompt, a quarter of the batch in every iteration, against bare forwards of the batches it makes."""
    size, rollouts = replace(size, steps=10), max(1, size.batch // 4)
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    clock, inside, rows = NetworkClock(network), list[float](), list[int]()
    config = FINDConfig(iterations=ITERATIONS, rollouts=rollouts, samples=rollouts, reused=rollouts)

    def program() -> Steered:
        clock.read()
        outcome = FIND(config).steer(task, denoiser(task.model), task.reward, ["3"], Noise(0))
        inside.append(clock.read())
        return outcome

    handle = network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    outcome = program()
    handle.remove()
    assert sum(rows) == outcome.ledger.nfe == (ITERATIONS + 1) * rollouts * size.steps

    def floor() -> None:
        with torch.no_grad():
            for count in rows:
                network(inputs.x_t[:count], inputs.t[:count], inputs.label[:count])

    return Subject(
        name="find",
        bound=1.10,
        program=f"FIND of one prompt, {ITERATIONS} iterations of {rollouts} samples of {size.steps} steps and as many "
        "reused, then as many fresh samples",
        floor=f"{len(rows)} forwards of the same network with the same numbers of rows, without gradient",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, network) | {"rollouts": rollouts, "value_hidden": config.value_hidden},
        extra={"nfe": outcome.ledger.nfe, "reward_calls": outcome.ledger.reward_calls, "network_calls": len(rows)},
        phases={"network": inside},
    )
