"""The ledger in words."""

import pytest

from difftilt.models.ledger import Ledger, in_words


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        (Ledger(), "nothing"),
        (Ledger(nfe=1), "1 network evaluation"),
        (Ledger(nfe=3400, reward_calls=1), "3 400 network evaluations and 1 reward call"),
        (
            Ledger(1, 2, 1, 1_000_000),
            "1 network evaluation, 2 reward calls, 1 gradient pass and 1 000 000 auxiliary calls",
        ),
    ],
)
def test_a_ledger_is_read_in_words(spent: Ledger, words: str) -> None:
    assert str(spent) == words


def test_what_is_not_bounded_is_not_named() -> None:
    assert in_words({"nfe": None, "reward_calls": 7, "seconds": 1.5}) == "7 reward calls and 1.5 seconds"
