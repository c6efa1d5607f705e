"""From mappings to frozen dataclasses, strictly: the one bridge between configs and code.

``build(cls, mapping)`` fills a dataclass; ``make(table, mapping)`` picks the class by the mapping's
``name`` first; ``to_dict`` goes back. A field that holds a thing chosen by name says so by
``section(TABLE)``. Unknown keys, wrong types and bad choices are errors that carry the whole path.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the path, the value and the mend."""


def section(table: Mapping[str, type], default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field whose value is an instance of one of ``table``'s classes."""
    metadata = {**kwargs.pop("metadata", {}), "table": table}
    if default is not dataclasses.MISSING:
        kwargs["default_factory"] = default
    return dataclasses.field(metadata=metadata, **kwargs)


def run_field(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field of kind *run*: where and how, not what is learned; left out of the identity."""
    if default is not dataclasses.MISSING:
        kwargs["default"] = default
    return dataclasses.field(metadata={"run": True}, **kwargs)


def make(table: Mapping[str, type], mapping: Any, path: str = "config") -> Any:
    """Build the class that ``mapping["name"]`` chooses from ``table`` with the other keys.

    Raises:
      ConfigError: no name, an unknown name, or what ``build`` raises.
    """
    if dataclasses.is_dataclass(mapping):
        return mapping
    if not isinstance(mapping, Mapping) or "name" not in mapping:
        raise ConfigError(f"{path} must be a section with a name, one of {sorted(table)}")
    name = mapping["name"]
    if name not in table:
        raise ConfigError(f"{path}.name={name!r}: choose from {sorted(table)}{near(name, table)}")
    rest = {k: v for k, v in mapping.items() if k != "name"}
    return build(table[name], rest, path)


def build(cls: type, mapping: Any, path: str = "config") -> Any:
    """Build the frozen dataclass ``cls`` from ``mapping``, checking keys, types and choices.

    Raises:
      ConfigError: a key that ``cls`` does not have, a value of the wrong type, a missing
        required key, or a ``ValueError`` of the class itself, with ``path`` put before it.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path}={mapping!r}: expected a section with the keys of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(
                f"{path}.{key} is not a field of {cls.__name__}{near(key, fields)}; "
                f"the fields are {', '.join(sorted(fields))}. Another kind of thing is chosen by "
                "the config's argument (--config=FILE.py:ARG), not by single overrides"
            )
    hints = typing.get_type_hints(cls)
    values = {
        key: _field(fields[key], hints[key], value, f"{path}.{key}")
        for key, value in mapping.items()
    }
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _field(field: dataclasses.Field, hint: Any, value: Any, path: str) -> Any:
    table = field.metadata.get("table")
    if table is not None:
        if value is None and type(None) in typing.get_args(hint):
            return None
        return make(table, value, path)
    return _convert(hint, value, path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        return _convert(rest[0], value, path) if len(rest) == 1 else value
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{path}={value!r}: choose from {list(args)}{near(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{path}={value!r}: expected a tuple, such as ({value!r},)")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}: expected a mapping")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        mend = ""
        if hint is int and isinstance(value, float) and value.is_integer():
            mend = f"; write {int(value)}"
        raise ConfigError(
            f"{path}={value!r} is a {type(value).__name__}, expected {hint.__name__}{mend}"
        )
    return value


def to_dict(thing: Any, table: Mapping[str, type] | None = None) -> Any:
    """The mapping that ``build`` (or ``make``, with its ``table``) turns back into ``thing``."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        out = {}
        if table is not None:
            out["name"] = next(name for name, cls in table.items() if cls is type(thing))
        for f in dataclasses.fields(thing):
            if f.init:
                out[f.name] = to_dict(getattr(thing, f.name), f.metadata.get("table"))
        return out
    if isinstance(thing, Mapping):
        return {k: to_dict(v) for k, v in thing.items()}
    if isinstance(thing, tuple | list):
        return [to_dict(v) for v in thing]
    return thing


def identity(thing: Any, table: Mapping[str, type] | None = None) -> Any:
    """``to_dict`` without the fields of kind *run*: what decides which thing is learned."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        out = {}
        if table is not None:
            out["name"] = next(name for name, cls in table.items() if cls is type(thing))
        for f in dataclasses.fields(thing):
            if f.init and not f.metadata.get("run"):
                out[f.name] = identity(getattr(thing, f.name), f.metadata.get("table"))
        return out
    return to_dict(thing)


def choices(word: Any, words: Any, most: int = 40) -> str:
    """The words to choose from, as an error lists them; of more than ``most``, those most alike."""
    names = [str(w) for w in words]
    if len(names) <= most:
        return ", ".join(names) + near(word, names)
    alike = difflib.get_close_matches(str(word), names, n=most // 4, cutoff=0.0)
    return f"{', '.join(alike)}, or others; there are {len(names)}"


def near(word: Any, words: Any) -> str:
    """A hint at the closest of the words, or nothing."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
