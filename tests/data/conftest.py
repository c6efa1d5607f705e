"""Stores under test lie in memory where that can be: a commit waits for the disk many times."""

import os
import pathlib
import tempfile

import pytest


@pytest.fixture
def tmp_path(tmp_path):
    shm = pathlib.Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm, prefix="saex-test-") as folder:
        yield pathlib.Path(folder)
