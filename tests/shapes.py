"""The run-time checker of the tests: shapes and dtypes of annotated tensors, and nothing else.

Protocols are left to the static checker: asking a protocol at run time evaluates every property of the object.
Functions without a tensor in their signature stay as they are, and of the others every combination of shapes is
checked once: with the decorator of jaxtyping, checking took longer than what was checked.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jaxtyping
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Arrays = tuple[type[AbstractArray], ...]
RETURN = "return"


def install() -> None:
    """Check every function of the package, defined from now on."""
    # what the hook puts on every function; its own way of calling a type checker is replaced as a whole
    jaxtyping.jaxtyped = lambda *, typechecker: decorate  # pyright: ignore[reportAttributeAccessIssue]
    jaxtyping.install_import_hook("difftilt", None)


def decorate(thing: Any) -> Any:
    """What checks a function; of a dataclass, its fields when it is made; anything else is left alone."""
    if not isinstance(thing, type):
        return check(thing)
    if "__dataclass_fields__" in vars(thing):
        thing.__init__ = check(thing.__init__)
    return thing


def array_types(annotation: Any) -> Arrays:
    """The array types in an annotation, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(array for part in typing.get_args(annotation) for array in array_types(part))
    return ()


def check(function: F) -> F:
    """Raise ``TypeError`` where a tensor does not fit the array types of its annotation."""
    annotations = _resolved(function)
    arrays = {name: array_types(annotation) for name, annotation in annotations.items() if array_types(annotation)}
    if not arrays:
        return function
    expected = {name: types for name, types in arrays.items() if name != RETURN}
    returned = {RETURN: arrays[RETURN]} if RETURN in arrays else {}
    places = [(place, name) for place, name in enumerate(_single(function)) if name in expected]
    known = set[tuple[Any, ...]]()

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {name: args[place] for place, name in places if place < len(args)}
        given |= {name: kwargs[name] for name in kwargs if name in expected}
        before = tuple((name, _kind(value)) for name, value in given.items())
        if before not in known:
            _check(given, expected, function)
            known.add(before)
        result = function(*args, **kwargs)
        if returned and (before, _kind(result)) not in known:
            _check(given | {RETURN: result}, expected | returned, function)
            known.add((before, _kind(result)))
        return result

    return typing.cast(F, checked)


def _single(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that take one positional argument each."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _kind(value: Any) -> Any:
    """What a verdict depends on: two calls with tensors of the same kinds need one."""
    return (value.dtype, value.shape) if isinstance(value, Tensor) else None


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations; what stands in quotes and cannot be evaluated yet, or at all, is no array."""
    found = dict(getattr(function, "__annotations__", {}))
    for name, annotation in found.items():
        if isinstance(annotation, str):
            try:
                found[name] = eval(annotation, getattr(function, "__globals__", {}))
            except (NameError, TypeError):
                found[name] = None
    return found


def _check(values: dict[str, Any], arrays: dict[str, Arrays], function: Callable[..., Any]) -> None:
    # one scope for the names of dimensions
    with jaxtyped("context"):
        for name, value in values.items():
            if isinstance(value, Tensor) and not any(isinstance(value, array) for array in arrays[name]):
                what = f"{name} of {function.__module__}.{function.__qualname__}"
                raise TypeError(f"{what} is {value.dtype} {tuple(value.shape)}, expected {arrays[name]}")
