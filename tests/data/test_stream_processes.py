"""Real processes, one stream: the same global batches as one process reads."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from saex.data import Column, Store, StoreWriter
from saex.data.stream import Stream

CHILD = """
import sys
import jax
import numpy as np
path, port, index, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // count)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
from saex.data import Store
from saex.data.stream import Stream
mesh = jax.make_mesh((4,), ("data",))
batches = Stream(batch=32, window=3).open(Store.open(path), ["row"], 7, mesh)
iterator = batches.iterate(5)
total = jax.jit(lambda x: x.sum())
for step in range(5, 25):
    rows = next(iterator)["row"]
    local = np.concatenate([np.asarray(s.data) for s in rows.addressable_shards])
    print("batch", step, int(total(rows)), *local.tolist())
iterator.close()
jax.distributed.shutdown()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_the_parts_of_the_same_batches(tmp_path, processes):
    n = np.arange(500)
    columns = {"row": Column((), "int32"), "position": Column((), "int32")}
    with StoreWriter(tmp_path, columns, chunk_rows=16) as writer:
        writer.append({"row": n, "position": n % 9})
        writer.finish()
    command, port = [sys.executable, "-c", CHILD, str(tmp_path)], str(free_port())
    children = [
        subprocess.Popen(
            [*command, port, str(i), str(processes)], stdout=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    outputs = [child.communicate(timeout=120)[0].splitlines() for child in children]
    outputs = [[line for line in lines if line.startswith("batch")] for lines in outputs]
    assert all(child.returncode == 0 for child in children)
    alone = Stream(batch=32, window=3).open(Store.open(tmp_path), ["row"], 7)
    for step in range(5, 25):
        expected = alone.gather(step * 32, step * 32 + 32)["row"].tolist()
        lines = [[int(v) for v in output[step - 5].split()[1:]] for output in outputs]
        assert {len(line[2:]) for line in lines} == {32 // processes}
        assert [row for line in lines for row in line[2:]] == expected
        assert [line[:2] for line in lines] == [[step, sum(expected)]] * processes
    alone.close()
