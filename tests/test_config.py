"""Configuration: strict types, unknown keys, every error of every section in one message."""

import math
from collections.abc import Mapping
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from difftilt.config import Config, Problems, dump, parse
from difftilt.errors import UserError


class Inner(Config):
    rate: float = Field(default=0.5, gt=0)
    """Of decay."""
    pair: tuple[int, int] = (1, 2)


class Outer(Config):
    count: int = Field(default=3, ge=1)
    kind: Literal["sum", "mean"] = "sum"
    inner: Inner = Inner()
    either: int | tuple[int, ...] = 1
    name: str = "x"
    active: bool = False

    @model_validator(mode="after")
    def _divides(self) -> "Outer":
        if self.count == 7:
            raise ValueError("count 7 does not divide: use 6 or 8")
        return self


class Numbers(Config):
    inner: Inner = Inner()
    mixed: float | Literal["kl"] = "kl"
    table: dict[str, float] = Field(default_factory=dict[str, float])


def lines(data: Mapping[str, object], config: type[Config] = Outer) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(config, data, "method")
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_fill_in_and_the_result_is_frozen() -> None:
    config = parse(Outer, {"inner": {"rate": 2}})
    assert config.inner == Inner(rate=2.0)
    assert config.count == 3
    with pytest.raises(ValidationError):
        config.count = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_unknown_keys_name_the_nearest_at_their_own_level() -> None:
    assert lines({"cuont": 1}) == ["method.cuont = 1: unknown key; did you mean count?"]
    assert lines({"inner": {"rat": 1}}) == ["method.inner.rat = 1: unknown key; did you mean rate?"]
    assert "known: active, count, either, inner, kind, name" in lines({"zzzzzz": 1})[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "3"),  # text is not a number
        ("count", True),  # true is not 1
        ("count", 2.5),
        ("count", 0),  # bound
        ("count", None),
        ("kind", "max"),
        ("name", 5),
        ("active", 1),
        ("active", "yes"),
        ("inner", 3),
        ("either", "x"),
    ],
)
def test_wrong_values_name_key_and_value(key: str, value: object) -> None:
    (line,) = lines({key: value})
    assert line.startswith(f"method.{key} = ")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused_wherever_they_stand(value: float) -> None:
    for data in ({"inner": {"rate": value}}, {"mixed": value}, {"table": {"a": value}}):
        (line,) = lines(data, Numbers)
        assert line.startswith("method.")
        assert "should be a finite number" in line
    with pytest.raises(ValidationError, match="finite"):
        Numbers(mixed=value)


def test_all_errors_of_all_sections_come_together() -> None:
    problems = Problems()
    problems.parse(Outer, {"count": "many", "knd": "sum", "inner": {"rate": -1}}, "method")
    problems.parse(Inner, {"pair": [1]}, "training")
    problems.add("testbed.name: there is none")
    with pytest.raises(UserError) as caught:
        problems.check("file.yaml")
    text = str(caught.value)
    assert text.startswith("5 errors in file.yaml")
    for part in ("method.count", "method.knd", "method.inner.rate", "training.pair", "testbed.name"):
        assert part in text


def test_a_contradiction_between_fields_is_told_without_the_whole_input() -> None:
    assert lines({"count": 7}) == ["method: count 7 does not divide: use 6 or 8"]


def test_values_that_are_not_plain_are_refused() -> None:
    with pytest.raises(UserError, match="only plain values"):
        parse(Outer, {"name": object()})


def test_lists_are_tuples_and_integers_are_floats() -> None:
    config = parse(Outer, {"either": [1, 2], "inner": {"rate": 1, "pair": [3, 4]}})
    assert config.either == (1, 2)
    assert config.inner.pair == (3, 4)
    assert isinstance(config.inner.rate, float)


@given(
    count=st.integers(1, 10**12).filter(lambda value: value != 7),
    rate=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    either=st.integers() | st.lists(st.integers(), max_size=3),
    name=st.text(max_size=8),
)
def test_dump_and_parse_are_inverse(count: int, rate: float, either: int | list[int], name: str) -> None:
    config = parse(Outer, {"count": count, "inner": {"rate": rate}, "either": either, "name": name})
    assert parse(Outer, dump(config)) == config
    assert math.isclose(config.inner.rate, rate, rel_tol=0.0)
