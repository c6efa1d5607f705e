"""Two processes, one run: the same losses as one process with as many devices."""

import json
import os
import socket
import subprocess
import sys

import numpy as np

from saex import metrics
from tests import runs


def command(path, workdir):
    mesh = ("--config.mesh.data=2", "--config.mesh.model=2")
    return [
        sys.executable,
        "-m",
        "saex.cli",
        "train",
        f"--config={path}",
        f"--workdir={workdir}",
        *mesh,
    ]


def losses(workdir):
    return [line["loss"] for line in metrics.read(workdir) if "loss" in line]


def test_two_processes_train_checkpoint_and_evaluate_like_one(tmp_path):
    runs.write_text(tmp_path / "text")
    runs.write_model(tmp_path / "model.safetensors")
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({runs.mapping(tmp_path)!r})\n"
    )
    subprocess.run(command(config, tmp_path / "one"), check=True, timeout=300, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            command(config, tmp_path / "two"),
            env={
                **os.environ,
                "SAEX_COORDINATOR": f"127.0.0.1:{port}",
                "SAEX_NUM_PROCESSES": "2",
                "SAEX_PROCESS_ID": str(i),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-2000:]
    finally:
        for process in processes:
            process.kill()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = (json.loads((tmp_path / w / "eval.json").read_text()) for w in ("one", "two"))
    np.testing.assert_allclose(two["fvu"], one["fvu"], rtol=1e-4)
