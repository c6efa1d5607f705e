"""From a config file and overrides to one frozen ``Config``.

``experiments/*.py`` hold ``get_config(arg) -> ConfigDict``; ``load`` reads the file and puts the
overrides in, ``resolve`` turns the result, strictly, into dataclasses. Nothing else in saex sees a
ConfigDict. The dataclass of a thing is its section; defaults live there and nowhere else.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from saex import cost
from saex.data import SOURCES
from saex.data.stream import Stream
from saex.data.text import Stdlib
from saex.harvest import Harvest
from saex.live import Live, check_live
from saex.models import MODELS, PocketLM
from saex.registry import (
    ConfigError,
    build,
    choices,
    identity,
    near,
    run_field,
    section,
    to_dict,
)
from saex.sae import SAES
from saex.sharding import MeshConfig, check_divisible
from saex.train.optim import Optim


@dataclasses.dataclass(frozen=True)
class Log:
    """every: steps between lines of metrics. tensorboard: write event files too."""

    every: int = 10
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """every: steps between checkpoints. keep: how many of the newest stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every}, keep={self.keep}: at least 1")


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured on held-out text.

    Fields:
      rows: activation rows for dead latents, where there are as many; at most 262,144 of them for
        reconstruction.
      contexts: contexts for cross-entropy with the reconstruction put in place.
      controls: also score PCA, an untrained dictionary and a per-token mean.
      every: steps between small evaluations during the run; 0: only at the end.
    """

    rows: int = 1_000_000
    contexts: int = 256
    controls: bool = True
    every: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """latents: how many are shown. contexts: top contexts of each. enabled: write the page."""

    latents: int = 24
    contexts: int = 8
    enabled: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Fields:
      sae: the dictionary, by name. site: the hook point that it is trained on; "a+b" are two side
        by side. columns: where in the store other columns of the method lie, by their name in a
        batch, such as ``{"y": "blocks.1.mlp_out"}``; by default under that very name.
      steps or tokens: the budget, in updates or in rows; exactly one.
      seed: of weights, data order and draws. data_seed: of the data order alone; None: ``seed``.
      members: a stack: dictionaries that are trained together on one stream, each as overrides of
        this configuration, such as ``{"seed": 1, "optim.lr": 1e-3, "sae.k": 16}``: seeds, learning
        rates, and what the method's ``hyper`` names (k up to this configuration's).
      subject: the model whose activations are taken; None for rows that no model of saex made
        (then there is no cross-entropy). text: the documents it reads.
      harvest: how they become a store. store: to use instead of harvesting into the workdir: a
        folder with ``train`` and ``heldout`` stores, or one store, of which a hash of the document
        or row holds out 12%. live: make the rows while the run goes on, without a store of them.
        stream: how rows become batches.
      optim, mesh, checkpoint, log, eval, report: see their classes.
    """

    sae: Any = section(SAES)
    site: str = "blocks.1.resid_post"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    tokens: int | None = None
    seed: int = 0
    data_seed: int | None = None
    members: tuple[dict[str, Any], ...] = ()
    subject: Any | None = section(MODELS, PocketLM)
    text: Any = section(SOURCES, Stdlib)
    harvest: Harvest = dataclasses.field(default_factory=Harvest)
    store: str | None = run_field(None)
    live: Live = dataclasses.field(default_factory=Live)
    stream: Stream = dataclasses.field(default_factory=Stream)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: MeshConfig = run_field(default_factory=MeshConfig)
    checkpoint: Checkpoint = run_field(default_factory=Checkpoint)
    log: Log = run_field(default_factory=Log)
    eval: Eval = run_field(default_factory=Eval)
    report: Report = run_field(default_factory=Report)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps={self.steps}, tokens={self.tokens}: set exactly one of them, the budget in "
                "updates or in rows"
            )
        if self.n_steps < 1:
            raise ValueError(
                f"steps={self.steps}, tokens={self.tokens}: less than one batch of "
                f"{self.stream.batch} rows"
            )
        if self.stream.batch % self.mesh.data:
            raise ValueError(
                f"stream.batch={self.stream.batch} is not divisible by mesh.data={self.mesh.data}; "
                f"use a multiple of {self.mesh.data}"
            )
        for name in self.columns:
            if name == "x" or name not in self.sae.columns:
                raise ValueError(
                    f"columns[{name!r}]: {type(self.sae).__name__} reads {list(self.sae.columns)}; "
                    "x is named by config.site, the others may be named here"
                )
        check_divisible(self.sae.specs(), self.mesh)
        check_live(self)
        _check_members(self)

    @property
    def reads(self) -> dict[str, str]:
        """What a batch is made of: the dictionary's columns, and where they lie in the store."""
        named: dict[str, str] = {**self.columns, "x": self.site}
        return {name: named.get(name) or name for name in self.sae.columns}

    @property
    def order_seed(self) -> int:
        """The seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def n_steps(self) -> int:
        """The budget in updates."""
        return self.steps if self.steps is not None else (self.tokens or 0) // self.stream.batch


def expand(config: Config) -> list[Config]:
    """The configuration of each member of a stack, as it would be trained alone; else itself.

    Raises:
      ConfigError: a member that changes what members must share, or a wrong value.
    """
    if not config.members:
        return [config]
    out = []
    for i, overrides in enumerate(config.members):
        mapping = {**to_dict(config), "members": [], "data_seed": config.order_seed}
        mapping["mesh"] = {**mapping["mesh"], "sweep": 1}
        for key, value in overrides.items():
            _override(mapping, key, value, f"config.members[{i}]")
        out.append(build(Config, mapping, f"config.members[{i}]"))
    return out


def _check_members(config: Config) -> None:
    """Refuse a stack whose members could not share a program, or are wrong themselves."""
    if len(config.members) % config.mesh.sweep or (config.mesh.sweep > 1 and not config.members):
        raise ValueError(
            f"mesh.sweep={config.mesh.sweep} places for {len(config.members)} members: give a "
            "multiple of mesh.sweep members (config.members)"
        )
    hyper = sorted(config.sae.hyper())
    allowed = ["seed", "optim.lr", *(f"sae.{name}" for name in hyper)]
    for i, overrides in enumerate(config.members):
        for key, value in overrides.items():
            if key not in allowed:
                raise ValueError(
                    f"members[{i}] changes {key!r}; members of a stack may differ in "
                    f"{', '.join(allowed)}. Train what differs in more in a run of its own"
                )
            if key == "sae.k" and isinstance(value, int) and value > config.sae.k:
                raise ValueError(
                    f"members[{i}] has sae.k={value}, above the stack's sae.k={config.sae.k}: set "
                    "config.sae.k to the largest of them"
                )
    expand(config)  # a wrong value is named now, before a device is touched


def resolve(mapping: Mapping[str, Any]) -> Config:
    """The frozen configuration of a mapping (a ConfigDict's ``to_dict()``, or JSON).

    Raises:
      ConfigError: with the whole path of what is wrong, and the mend.
    """
    return build(Config, mapping)


def to_json(config: Config) -> dict[str, Any]:
    """What ``resolve`` turns back into ``config``."""
    return to_dict(config)


def describe(config: Config, hardware: str | None = None) -> str:
    """The resolved configuration, the parameter count and memory held on ``hardware``, as text.

    hardware: as for ``cost.memory``.
    """
    specs = config.sae.specs()
    counts = {name: math.prod(s.shape) for name, s in specs["params"].items()}
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    dtypes = config.harvest.made_as, config.optim.moments
    members = max(len(config.members), 1)
    memory = cost.memory(config.sae, config.stream.batch, config.mesh, *dtypes, members, hardware)
    lines = [
        json.dumps(to_json(config), indent=1),
        f"hash            {run_hash(config)}",
        f"budget          {config.n_steps:,} steps of {config.stream.batch:,} rows",
        f"learning rate   {config.optim.learning_rate(config.sae.n):.3g}",
        f"parameters      {sum(counts.values()):,} ({each})",
        str(memory),
    ]
    return "\n".join(lines)


def run_hash(config: Config) -> str:
    """12 hexadecimal digits of what is learned: identity fields only."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def recorded_identity(record: Mapping[str, Any]) -> Any:
    """What a workdir's config.json is about, with the defaults of fields that are newer than it."""
    try:
        return json.loads(json.dumps(identity(resolve(record["config"]))))
    except ConfigError:  # a field that is no more: what differs is said by what was written then
        return record["identity"]


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Where two identity mappings differ, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in sorted({*old, *new}):
            out += differences(old.get(key), new.get(key), f"{path}.{key}")
        return out
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def load(file: str, overrides: Sequence[tuple[str, str]] = (), cls: type = Config) -> Any:
    """The configuration, a ``cls``, of ``path/to/file.py[:arg]`` with overrides put in.

    Overrides are (path, value) as typed: ``("sae.k", "64")``. Values are Python literals (64, 1e-3,
    None, True, (0, 1)); anything else is a string. An override of a field that the file sets goes
    through its ConfigDict, so that references to it follow.

    Raises:
      ConfigError: no such file, no ``get_config`` in it, an unknown kind or key, or as ``resolve``.
    """
    path, _, arg = file.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config={file}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={path}: the file has no get_config(arg) function")
    try:
        config = module.get_config(arg) if arg else module.get_config()
    except KeyError as err:
        if err.args != (arg,):
            raise
        known = choices(arg, getattr(module, "SAES", ())) or "what its get_config knows"
        raise ConfigError(f"--config={file}: no kind {arg!r}; choose from {known}") from err
    rest = [(key, text) for key, text in overrides if not _set(config, key, text)]
    if not rest:
        return build(cls, config.to_dict())
    mapping = to_dict(build(cls, config.to_dict()))
    for key, text in rest:
        _override(mapping, key, literal(text), "--config")
    return build(cls, mapping)


def _set(config: Any, key: str, text: str) -> bool:
    """Put an override into a ConfigDict that has the field; whether it has."""
    *parents, last = key.split(".")
    for part in parents:
        config = config.get(part, None) if hasattr(config, "ignore_type") else None
    if not hasattr(config, "ignore_type") or last not in config or last == "name":
        return False
    if hasattr(config[last], "ignore_type"):
        return False
    with config.ignore_type():
        config[last] = literal(text)
    return True


# Fields whose keys are names that the user gives: of columns, of models.
_KEYED = ("config.columns", "config.stream.exclude", "config.subject.paths")


def _override(mapping: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put an override of a field that the file leaves at its default into the whole mapping."""
    *parents, last = key.split(".")
    node, seen = mapping, "config"
    for part in parents:
        if not isinstance(node.get(part), dict):
            sections = sorted(k for k, v in node.items() if isinstance(v, dict))
            raise ConfigError(
                f"{where}.{key}: {seen} has no section {part!r}{near(part, sections)}; "
                f"sections: {', '.join(sections)}"
            )
        node, seen = node[part], f"{seen}.{part}"
    if last not in node and seen not in _KEYED:
        raise ConfigError(
            f"{where}.{key}: {seen} has no field {last!r}{near(last, node)}; its fields: "
            f"{', '.join(sorted(node))}"
        )
    if isinstance(node.get(last), dict):
        raise ConfigError(f"{where}.{key}: a section; override its fields one by one")
    if last == "name":
        raise ConfigError(
            f"{where}.{key}={value}: another kind of thing is chosen by the config's argument "
            "(--config=FILE.py:ARG), since its fields are others too"
        )
    node[last] = value


def literal(text: str) -> Any:
    """The Python literal that ``text`` is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
