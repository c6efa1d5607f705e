"""Resume: a job that is killed sees, when it goes on, the batches that it would have seen."""

import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from saex.data import Column, Store, StoreWriter
from saex.data.stream import Stream

# What the child and the unbroken run have in common.
STREAM = {"batch": 64, "window": 16, "exclude_positions": (0,), "threads": 2}

CHILD = """
    import hashlib, sys
    import jax, numpy as np
    from saex.data import Store
    from saex.data.stream import Stream
    path, step = sys.argv[1], int(sys.argv[2])
    batches = Stream(**eval(sys.argv[3])).open(Store.open(path), ["x", "n"], 7)
    for i, batch in enumerate(batches.iterate(step), step):
        jax.block_until_ready(batch)
        text = b"".join(np.asarray(batch[name]).tobytes() for name in ("x", "n"))
        print(i, hashlib.sha256(text).hexdigest(), flush=True)
"""


def write(path, rows):
    n = np.arange(rows)
    columns = {"x": Column((24,)), "n": Column((), "int32"), "position": Column((), "int32")}
    with StoreWriter(path, columns, chunk_rows=32) as writer:
        for at in range(0, rows, 700):
            part = n[at : at + 700]
            x = np.sin(part[:, None] * np.arange(1, 25))
            writer.append({"x": x, "n": part, "position": part % 11})
            writer.commit({})
        writer.finish()


def digest(batch):
    return hashlib.sha256(b"".join(batch[n].tobytes() for n in ("x", "n"))).hexdigest()


def check_kills(path, kills, seed):
    """Kills a job at random steps; each attempt goes on after the last step that was told of."""
    write(path, 3000)
    batches = Stream(**STREAM).open(Store.open(path), ["x", "n"], 7)
    command, step = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)], 0
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        child = subprocess.Popen(
            [*command, str(step), repr(STREAM)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(rng.integers(1, 40)):
            number, found = child.stdout.readline().split()
            assert int(number) == step
            assert found == digest(batches.gather(step * 64, step * 64 + 64)), f"step {step}"
            step += 1
        child.kill()
        child.communicate(timeout=60)
    batches.close()
    assert step > kills


def test_kill_9_at_3_random_steps(tmp_path):
    check_kills(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_kill_9_at_50_random_steps(tmp_path):
    check_kills(tmp_path, 50, seed=1)


FIRST_BATCH = """
    import sys, time
    import grain, jax, numpy as np
    from saex.data import Store
    from saex.data.split import open_split
    from saex.data.stream import Stream
    path, epoch = sys.argv[1], 10_000_000 // 4096
    jax.device_put(np.ones(8)).block_until_ready()
    for side in ("whole", "train"):  # a whole store; one whose documents a hash splits
        for step in (0, epoch // 3, epoch - 1, 7 * epoch + 5):
            started, used = time.perf_counter(), time.process_time()
            store = Store.open(path) if side == "whole" else open_split(path, side)
            batches = Stream().open(store, ["x"], 0)
            iterator = batches.iterate(step)
            jax.block_until_ready(next(iterator))
            seconds, used = time.perf_counter() - started, time.process_time() - used
            iterator.close()
            batches.close()
            print(f"{side} store, step {step}: {seconds:.3f} s, of all threads' time {used:.3f}")
"""


@pytest.mark.slow
def test_first_batch_within_a_second_at_any_position_of_10_million_rows(tmp_path):
    rows, block = 10_000_000, 500_000
    columns = {"x": Column((16,)), "document": Column((), "int32"), "position": Column((), "int32")}
    n, x = np.arange(block), np.ones((block, 16), np.float32)
    with StoreWriter(tmp_path, columns) as writer:
        for at in range(0, rows, block):
            writer.append({"x": x, "document": (at + n) // 500, "position": (at + n) % 128})
            writer.commit({})
        writer.finish()
    # In a process of its own, as a job is: this one checks the types of every call.
    command = [sys.executable, "-c", textwrap.dedent(FIRST_BATCH), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    print(said)
    used = [float(line.split()[-1]) for line in said.splitlines()]
    assert len(used) == 8 and max(used) < 1  # not the wall's: others may keep this machine busy
