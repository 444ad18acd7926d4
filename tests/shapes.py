"""The run-time checker of the tests: shapes and dtypes of annotated tensors, and nothing else.

Protocols are left to the static checker: asking a protocol at run time evaluates every property of the object.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtyping import AbstractArray
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def array_types(annotation: Any) -> tuple[type[AbstractArray], ...]:
    """The array types in an annotation, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(array for part in typing.get_args(annotation) for array in array_types(part))
    return ()


def check(function: F) -> F:
    """Raise ``TypeError`` where a tensor does not fit the array types of its annotation."""
    signature = inspect.signature(function)
    expected = {name: array_types(parameter.annotation) for name, parameter in signature.parameters.items()}
    returned = array_types(signature.return_annotation)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _fits(value, expected[name], f"argument {name} of {function.__qualname__}")
        result = function(*args, **kwargs)
        _fits(result, returned, f"result of {function.__qualname__}")
        return result

    return typing.cast(F, checked)


def _fits(value: Any, arrays: tuple[type[AbstractArray], ...], what: str) -> None:
    if arrays and isinstance(value, Tensor) and not any(isinstance(value, array) for array in arrays):
        raise TypeError(f"{what} is {value.dtype} {tuple(value.shape)}, expected {arrays}")
