"""Imports go down, and each heavy library has one home."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "saex"
FILES = sorted(ROOT.rglob("*.py"))

LAYER = {
    **dict.fromkeys(("typing", "registry", "distributed", "sharding", "metrics"), 0),
    **dict.fromkeys(("kernels", "cost"), 1),
    **dict.fromkeys(("sae", "data", "models", "checkpoint", "interop"), 2),
    **dict.fromkeys(("train", "evals", "analysis", "intervene", "report"), 3),
    **dict.fromkeys(("config", "loop", "evaluate", "harvest", "member", "pretrain", "cli"), 4),
    **dict.fromkeys(
        (
            "calibration",
            "contexts",
            "harvest_room",
            "live",
            "live_devices",
            "live_rows",
            "stores",
            "tee",
        ),
        4,
    ),
    "__init__": 4,
}
SIDEWAYS = {("checkpoint", "sae"), ("interop", "sae")}
HOMES = {  # library or name -> where it may be imported or used
    "orbax": ("checkpoint.py",),
    "tensorstore": ("data/store",),
    "grain": ("data/stream.py",),
    "torch": ("models/",),
    "ml_collections": (),
    "launch": (),
    "experiments": (),
}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    mine = room(path)
    assert mine in LAYER, f"saex/{mine} has no layer; add it to this table"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "saex" or len(parts) < 2 or parts[1] not in LAYER:
            continue
        other = parts[1]
        same_floor = LAYER[other] == LAYER[mine] and LAYER[mine] == 2
        allowed = (mine, other) in SIDEWAYS or mine == other
        assert LAYER[other] <= LAYER[mine], f"{path.name} imports {name} from above"
        assert not same_floor or allowed, f"{path.name} imports {name} from beside"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_has_one_home(path):
    relative = str(path.relative_to(ROOT))
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or relative.startswith(homes or "-"), f"{relative} imports {name}"
    pallas = any(name.startswith("jax.experimental.pallas") for name in imports(path))
    kernel = path.name.startswith("pallas_") or relative == "kernels/mosaic_gpu.py"
    assert kernel or not pallas, f"{relative} imports Pallas"
    used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    collectives = {"shard_map", "psum", "all_gather", "pmax", "axis_index", "psum_scatter"}
    used -= {"axis_index"} if kernel else set()  # of a kernel's grid
    assert relative == "sae/ops.py" or not used & collectives, f"{relative}: {used & collectives}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_import_saex_touches_no_device_and_no_heavy_library():
    code = (
        "import sys, saex, saex.cli\n"
        "bad = {'jax', 'torch', 'tensorflow', 'orbax'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "from saex import TopK, load_sae, Config\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "bad = [m for m in sys.modules if m.startswith(('torch', 'jax.experimental.pallas'))]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
