"""Stores on object stores (`s3://`, `gs://`): read in place, copied to and from folders.

Buckets are reached by tensorstore's drivers, which take credentials from where the providers' own
tools do. `AWS_ENDPOINT_URL` and `AWS_REGION` name a server that is not Amazon's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from saex.data.manifest import StoreError

SCHEMES = ("s3", "gs")
# Attempts at a request, with growing pauses; then it is an error.
_RETRIES = {"max_retries": 5, "initial_delay": "200ms", "max_delay": "5s"}


def place(path: str | os.PathLike) -> Path | RemotePath:
    """A folder, or a place on an object store, by its name."""
    return RemotePath(os.fspath(path)) if is_remote(path) else Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names a place on an object store."""
    return urlsplit(os.fspath(path)).scheme in SCHEMES


def local(path: str | os.PathLike) -> Path:
    """A folder to write to.

    Raises:
      StoreError: a place on an object store.
    """
    if is_remote(path):
        raise StoreError(
            f"{os.fspath(path)}: stores are written to folders. Write one there, and then: "
            "saex store copy FOLDER s3://bucket/name"
        )
    return Path(path)


def absolute(path: str | os.PathLike) -> str:
    """The same place from whatever folder it is looked at."""
    return os.fspath(path) if is_remote(path) else str(Path(path).resolve())


@dataclass(frozen=True)
class RemotePath:
    """A name on an object store, with as much of `pathlib.Path` as a reader of stores needs."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def kvstore(self) -> dict[str, Any]:
        """The tensorstore specification of everything below this name."""
        parts = urlsplit(self.url)
        path = parts.path.strip("/") + "/"
        if parts.scheme == "gs":
            retries = {"gcs_request_retries": _RETRIES}
            return {"driver": "gcs", "bucket": parts.netloc, "path": path, **retries}
        spec: dict[str, Any] = {"driver": "s3", "bucket": parts.netloc, "path": path}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
        if "AWS_ACCESS_KEY_ID" in os.environ:
            spec["aws_credentials"] = {"type": "environment"}
        return {**spec, "s3_request_retries": _RETRIES}

    def is_dir(self) -> bool:
        """Object stores have no folders: True, so that messages say what is missing there."""
        return True

    def exists(self) -> bool:
        """Whether there is an object of this name. Raises OSError as `read_bytes`."""
        try:
            self.read_bytes()
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, start: int | None = None, stop: int | None = None) -> bytes:
        """The object's bytes [start, stop).

        Raises:
          FileNotFoundError: there is no such object.
          OSError: it cannot be read, also not by trying again, or is too short.
        """
        try:
            found = self._folder().read(self.name, byte_range=slice(start, stop)).result()
        except ValueError as err:
            raise OSError(f"{self.url}: {str(err)[:300]}") from err
        if found.state != "value":
            raise FileNotFoundError(f"{self.url} does not exist")
        return found.value

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object as text. Raises as `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Writes the object, all or nothing. Raises OSError."""
        try:
            self._folder().write(self.name, data).result()
        except ValueError as err:
            raise OSError(f"{self.url}: {str(err)[:300]}") from err

    def _folder(self) -> Any:
        """The tensorstore key-value store that this name is in. Raises ValueError."""
        import tensorstore as ts

        folder = RemotePath(self.url.rstrip("/").rsplit("/", 1)[0])
        return ts.KvStore.open(folder.kvstore()).result()
