"""A train step that is compiled and never run, and what its compiled text says."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from saex.sharding import DATA, make_mesh, member_axis
from saex.train.optim import Optim
from saex.train.stack import make_stack_step, places
from saex.train.state import abstract_state
from saex.train.step import hyper_arrays, make_step

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def train_step(sae, batch, config, mesh=None, platform="cpu", members=1):
    """The compiled step of ``sae`` for ``batch`` bfloat16 rows, from shapes alone; or a stack's.

    Members are one behind the other, or on a mesh with a sweep axis on its places.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    optim = Optim()
    with jax.set_mesh(mesh):
        everywhere = jax.NamedSharding(mesh, jax.P())
        state = abstract_state(sae, optim.transformation(), mesh, config.strategy)
        rows = jax.NamedSharding(mesh, jax.P(DATA))
        x = jax.ShapeDtypeStruct((batch, sae.d_in), jnp.bfloat16, sharding=rows)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
        hyper = {
            name: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
            for name in jax.eval_shape(lambda: hyper_arrays(sae, optim, 100))
        }
        if members > 1:
            each = [[jax.tree.map(_joined, one)] * (members // places(mesh))
                    for one in (state, key, hyper)]  # fmt: skip
            traced = make_stack_step(sae, optim, 100).trace(each[0], {"x": x}, *each[1:])
        else:
            traced = make_step(sae, optim, 100).trace(state, {"x": x}, key, hyper)
        return traced.lower(lowering_platforms=(platform,)).compile()


def _joined(leaf):
    """The arrays of as many members as the mesh has places, as one; nothing of it without them."""
    mesh = leaf.sharding.mesh
    if not (axis := member_axis(mesh)):
        return leaf
    where = jax.NamedSharding(mesh, jax.P(*axis, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((places(mesh), *leaf.shape), leaf.dtype, sharding=where)


def bytes_of(compiled):
    """What the compiler says one device holds while the step runs."""
    m = compiled.memory_analysis()
    sizes = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return sizes - m.alias_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Exchange:
    kind: str
    shapes: tuple  # of its results: (dtype, (lengths))
    group: int  # devices that take part
    conditional: bool  # inside of a cond or a loop's body that a cond holds

    @property
    def payload(self):
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def exchanges(compiled):
    """Every collective of the compiled text in which more than one device takes part."""
    found = []
    for line in compiled.as_text().splitlines():
        m = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if m is None:
            continue
        size = _group(line)
        if size > 1:
            made = shapes(m[1])
            if m[3] and m[2] in ("all-gather", "collective-permute"):  # operands, results, marks
                made = tuple(s for s in made if s[0] != "u32" or s[1])
                made = made[len(made) // 2 :]
            found.append(Exchange(m[2], made, size, "/cond/" in line))
    return found


def shapes(text):
    """(dtype, lengths) of every array type in a piece of compiled text."""
    pairs = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return tuple((t, tuple(int(x) for x in dims.split(",") if x)) for t, dims in pairs)


def _group(line):
    if "source_target_pairs=" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1])
        return _ring([p for p in pairs if p[0] != p[1]])
    text = line.split("replica_groups=")[1]
    if m := re.match(r"\{\{([\d,]*)\}", text):
        return len(m[1].split(","))
    if m := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(m[1])
    axes = dict(re.findall(r"'(\w+)'=(\d+)", text.split("]")[0]))
    used = re.findall(r"'(\w+)'", text.split("{")[1].split("}")[0])
    return math.prod(int(axes[a]) for a in used)


def _ring(pairs):
    """Devices that a permutation connects with the first one that sends to another."""
    reached = set(pairs[0]) if pairs else set()
    for _ in pairs:
        reached |= {d for pair in pairs for d in pair if reached & set(pair)}
    return len(reached)


def sorts(compiled):
    """The shapes of what a sort in the compiled text is given."""
    lines = [s for s in compiled.as_text().splitlines() if re.search(r"\bsort\(", s)]
    return [shape for line in lines for _, shape in shapes(line.split("sort(")[0])]
