"""JSON to dataclasses and back: a file may say what the fields of a class say. Pure Python."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def read(kind: Any, value: Any, path: str) -> Any:
    """A value of JSON as `kind`: a dataclass, a named tuple, `tuple[X, ...]`, `Mapping[str, X]`, `Literal`, `X | None`.

    Raises:
        ValueError: it is none; names the place by its path, such as "stitches[3].route[0]".
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        return None if value is None else read(next(x for x in arguments if x is not NoneType), value, path)
    if is_dataclass(kind):
        return _read_fields(kind, value, path)
    if origin is Literal:
        if value not in [x for x in arguments if type(x) is type(value)]:
            raise ValueError(f"{path} must be one of {', '.join(map(repr, arguments))}, got {value!r:.80}")
        return value
    if kind is Any and isinstance(value, list | tuple):
        return [read(Any, x, f"{path}[{i}]") for i, x in enumerate(value)]
    if origin is tuple or hasattr(kind, "_fields"):
        return _read_members(kind, value, path)
    if origin is not None or (kind is Any and isinstance(value, Mapping)):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{path} must be a mapping by name, got {value!r:.80}")
        return {key: read(arguments[1] if arguments else Any, x, f"{path}.{key}") for key, x in value.items()}
    if kind is Any:
        if not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
            raise ValueError(f"{path} must be a finite number, text, None, or a list or mapping, got {value!r:.80}")
        return value
    # A boolean is an integer in Python, and an integer of more than 64 bits none to torch.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (type(value) is int and abs(value) >= 1 << 63):
        raise ValueError(f"{path} must be {_WORDS[kind]}, got {value!r:.80}")
    return value


def _read_members(kind: Any, value: Any, path: str) -> Any:
    names = getattr(kind, "_fields", ())
    types = tuple(get_type_hints(kind).values()) if names else get_args(kind)
    any_length = types[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(types)):
        wanted = "a list" if any_length else f"a list of {len(types)}"
        raise ValueError(f"{path} must be {wanted}{': ' if names else ''}{', '.join(names)}, got {value!r:.80}")
    members = [read(types[0] if any_length else types[i], x, f"{path}[{i}]") for i, x in enumerate(value)]
    return kind(*members) if names else tuple(members)


def write(value: Any) -> Any:
    """The inverse of `read`, in JSON types only; optional fields that are None, false or empty are left out."""
    if is_dataclass(value):
        kind: Any = type(value)
        named = {key: (getattr(value, name), required) for key, (name, _, required) in _fields(kind).items()}
        kept = {key: x for key, (x, required) in named.items() if required or not (x in (None, (), {}) or x is False)}
        return {key: write(x) for key, x in kept.items()}
    if isinstance(value, Mapping):
        return {key: write(x) for key, x in value.items()}
    return [write(x) for x in value] if isinstance(value, list | tuple) else value


@cache
def _fields(kind: Any) -> dict[str, tuple[str, Any, bool]]:
    """By the key in JSON (where "class" is no keyword) the name of each field, its type, and whether it is required."""
    hints = get_type_hints(kind)
    required = {x.name: x.default is MISSING and x.default_factory is MISSING for x in fields(kind)}
    return {name.rstrip("_"): (name, hints[name], required[name]) for name in required}


def _read_fields(kind: Any, value: Any, path: str) -> Any:
    known = _fields(kind)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be a mapping of {', '.join(known)}, got {value!r:.80}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{path} has no {key!r}; {hint}")
    missing = [key for key, (_, _, required) in known.items() if required and key not in value]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it has {sorted(value)}")
    given = {known[key][0]: read(known[key][1], x, f"{path}.{key}".lstrip(".")) for key, x in value.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None
