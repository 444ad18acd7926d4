"""Tilted Markov chains against enumeration, and their draws against their own law."""

import torch
from torch import Tensor

from difftilt.models.markov import MarkovPosterior
from difftilt.statistics import empirical, enumerate_sequences
from difftilt.statistics.chains import Chain, chain_of, tilt_chain

LENGTH, VOCAB = 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_chain() -> tuple[Tensor, Tensor, Chain]:
    initial = torch.rand(VOCAB, generator=generator(), dtype=torch.float64).softmax(0)
    transition = (3 * torch.rand(VOCAB, VOCAB, generator=generator(1), dtype=torch.float64)).softmax(1)
    return initial, transition, chain_of(initial, transition, LENGTH)


def scores_of(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, LENGTH, VOCAB, generator=generator(seed), dtype=torch.float64)


def test_the_chain_is_the_one_of_the_markov_model() -> None:
    initial, transition, chain = some_chain()
    every = enumerate_sequences(VOCAB, LENGTH)
    model = MarkovPosterior(initial, transition, LENGTH, residual=False)
    assert torch.allclose(chain.log_prob(every), model.log_prob(every), atol=1e-12)
    assert float(chain.log_prob(every).exp().sum()) == torch.tensor(1.0)


def test_tilting_is_the_enumerated_tilt() -> None:
    initial, transition, chain = some_chain()
    every, scores = enumerate_sequences(VOCAB, LENGTH), scores_of(2)
    rewards = scores[torch.arange(LENGTH), every].sum(1)
    tilted, log_z = tilt_chain(chain, scores)
    model = MarkovPosterior(initial, transition, LENGTH, residual=False)
    assert torch.allclose(tilted.log_prob(every), model.tilted(rewards, 1.0), atol=1e-10)
    assert torch.allclose(log_z, (chain.log_prob(every) + rewards).logsumexp(0), atol=1e-12)
    law = tilted.log_prob(every).exp()
    marginals = torch.stack([((every == letter) * law[:, None]).sum(0) for letter in range(VOCAB)], 1)
    assert torch.allclose(tilted.marginals(), marginals, atol=1e-12)


def test_rows_of_a_batch_have_their_own_normaliser() -> None:
    chain, scores = some_chain()[2], scores_of(3, 5)
    together = tilt_chain(chain, scores)[1]
    assert torch.allclose(together, torch.stack([tilt_chain(chain, one)[1] for one in scores]), atol=1e-12)


def test_forbidden_tokens_condition_the_chain() -> None:
    chain, every = some_chain()[2], enumerate_sequences(VOCAB, LENGTH)
    scores = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
    scores[1, 0] = scores[3, 1:] = -torch.inf
    tilted, log_z = tilt_chain(chain, scores)
    law = chain.log_prob(every).exp() * ((every[:, 1] != 0) & (every[:, 3] == 0))
    assert torch.allclose(log_z.exp(), law.sum(), atol=1e-12)
    assert torch.allclose(tilted.log_prob(every).exp(), law / law.sum(), atol=1e-12)


def test_draws_have_the_law_of_the_chain() -> None:
    tilted, count = tilt_chain(some_chain()[2], scores_of(4))[0], 20_000
    drawn = tilted.draw(torch.rand(count, LENGTH, generator=generator(5), dtype=torch.float64))
    law = tilted.log_prob(enumerate_sequences(VOCAB, LENGTH)).exp()
    gap = (empirical(drawn, VOCAB) - law).abs()
    # five standard errors for the worst of 81 frequencies, and one count for the rarest
    assert bool((gap <= 5 * (law / count).sqrt() + 1 / count).all())


def test_one_token_is_a_chain_too() -> None:
    chain = chain_of(torch.tensor([0.25, 0.75]), torch.eye(2), 1)
    tilted, log_z = tilt_chain(chain, torch.tensor([[torch.log(torch.tensor(3.0)), 0.0]]))
    assert torch.allclose(tilted.marginals(), torch.tensor([[0.5, 0.5]], dtype=torch.float64), atol=1e-7)
    assert torch.allclose(log_z.exp(), torch.tensor(1.5, dtype=torch.float64), atol=1e-7)
