"""Configs become dataclasses strictly, and errors say path, value and mend."""

import dataclasses
from typing import Literal

import pytest

from saex.registry import ConfigError, build, choices, identity, make, run_field, section, to_dict


@dataclasses.dataclass(frozen=True)
class Leafy:
    size: int = 3
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    shape: tuple[int, ...] = ()
    maybe: int | None = None

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size={self.size}: not negative")


TABLE = {"leafy": Leafy}


@dataclasses.dataclass(frozen=True)
class Tree:
    leaf: object = section(TABLE, Leafy)
    own: Leafy = dataclasses.field(default_factory=Leafy)
    where: str = run_field("here")


def test_round_trip():
    mapping = {"leaf": {"name": "leafy", "size": 4, "shape": [1, 2]}, "own": {"rate": 1}}
    tree = build(Tree, mapping)
    assert tree.leaf.shape == (1, 2) and tree.own.rate == 1.0
    assert build(Tree, to_dict(tree)) == tree


def test_identity_leaves_out_where_and_how():
    assert "where" in to_dict(Tree()) and "where" not in identity(Tree())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"own": {"sise": 1}}, r"config\.own\.sise is not a field of Leafy .did you mean 'size'"),
        ({"own": {"size": 1e3}}, r"config\.own\.size=1000\.0 is a float, expected int; write 1000"),
        ({"own": {"size": "3"}}, r"config\.own\.size='3' is a str, expected int"),
        ({"own": {"size": True}}, r"config\.own\.size=True is a bool"),
        ({"own": {"size": None}}, r"config\.own\.size=None is a NoneType"),
        ({"own": {"kind": "c"}}, r"config\.own\.kind='c': choose from"),
        ({"own": {"shape": 3}}, r"config\.own\.shape=3: expected a tuple"),
        ({"own": {"size": -1}}, r"config\.own: size=-1: not negative"),
        ({"leaf": {"name": "leavy"}}, r"config\.leaf\.name='leavy': choose .*did you mean"),
        ({"leaf": {"size": 1}}, r"config\.leaf must be a section with a name"),
        ({"own": 3}, r"config\.own=3: expected a section"),
    ],
)
def test_errors_name_path_value_and_mend(mapping, message):
    with pytest.raises(ConfigError, match=message):
        build(Tree, mapping)


def test_make_passes_instances_through():
    assert make(TABLE, Leafy(size=5)).size == 5


def test_choices_are_all_or_of_many_the_most_alike():
    assert choices("topkk", ["relu", "topk"]) == "relu, topk (did you mean 'topk'?)"
    many = [f"blocks.{i}.mlp" for i in range(100)]
    found = choices("block.77.mlp", many)
    assert found.startswith("blocks.77.mlp, ") and found.endswith("or others; there are 100")
    assert found.count(",") == 10
    assert choices("", many).count(",") == 10
