"""experiments/base.py names every field of the configuration, at its default."""

import dataclasses
import pathlib

import pytest

from saex.config import Config, load
from saex.registry import ConfigError
from saex.sae import SAES

BASE = pathlib.Path(__file__).parents[2] / "experiments" / "base.py"
# What has no default of its own; for `steps`, exactly one of two must be given.
CHOSEN = {"config.steps", "config.sae.d_in", "config.sae.d_out", "config.sae.n"}


def written(name):
    namespace = {}
    exec(compile(BASE.read_text(), str(BASE), "exec"), namespace)
    return namespace["get_config"](name).to_dict()


def compare(thing, mapping, path):
    """Each field of the dataclass stands in the mapping, at its default."""
    fields = {f.name: f for f in dataclasses.fields(thing)}
    named = {"name"} if "name" in mapping and "name" not in fields else set()
    assert set(mapping) - named == set(fields), f"{path} in experiments/base.py"
    for name, field in fields.items():
        here, value = f"{path}.{name}", getattr(thing, name)
        if dataclasses.is_dataclass(value):
            compare(value, mapping[name], here)
        elif here not in CHOSEN:
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            assert default == value == mapping[name], here


@pytest.mark.parametrize("name", sorted(SAES))
def test_base_names_every_field_at_its_default(name):
    config = load(f"{BASE}:{name}")
    assert type(config.sae) is SAES[name]
    compare(config, written(name), "config")


def test_base_has_a_comment_for_every_field():
    lines = [line.strip() for line in BASE.read_text().splitlines()]
    bare = [line for line in lines if line.startswith('"') and "#" not in line]
    assert [b for b in bare if not b.startswith(('"""', '"name"', '"topk"', '"relu"'))] == []


def test_sections_default_to_their_own_defaults():
    config = Config(sae=SAES["topk"](256, 4096), steps=1000)
    assert config == load(str(BASE))


def test_what_is_named_by_columns_is_overridden_column_by_column():
    config = load(str(BASE), [("stream.exclude.label", '("spam", 3)'), ("harvest.dtype", "int8")])
    assert config.stream.exclude == {"label": ("spam", 3)} and config.harvest.dtype == "int8"
    with pytest.raises(ConfigError, match=r"exclude.label='spam': expected a tuple"):
        load(str(BASE), [("stream.exclude.label", "spam")])
    with pytest.raises(ConfigError, match="no field 'excluded'"):
        load(str(BASE), [("stream.excluded", "()")])


@pytest.mark.parametrize("file", ["base.py", "quickstart.py", "methods/kron.py"])
def test_a_kind_that_a_file_does_not_have_is_an_error_that_names_those_it_has(file):
    with pytest.raises(
        ConfigError, match=r"no kind 'topq'; choose from .*topk.*did you mean 'topk'"
    ):
        load(f"{BASE.parent / file}:topq")
