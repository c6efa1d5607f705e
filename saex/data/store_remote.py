"""Names on object stores (`s3://`, `gs://`), with what readers and writers of stores need of them.

Buckets are reached by tensorstore's drivers, which take credentials from where the providers' own
tools do. `AWS_ENDPOINT_URL` and `AWS_REGION` name a server that is not Amazon's,
`TENSORSTORE_GCS_HTTP_URL` one that is not Google's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from saex.data.manifest import StoreError

SCHEMES = ("s3", "gs")
# Attempts at a request, with growing pauses; then it is an error.
_RETRIES = {"max_retries": 5, "initial_delay": "200ms", "max_delay": "5s"}
# Small objects that are read side by side: a request takes as long as the way there and back.
_SIDE_BY_SIDE = 16
_One = TypeVar("_One")
_Found = TypeVar("_Found")


def place(path: str | os.PathLike) -> Path | RemotePath:
    """A folder, or a place on an object store, by its name.

    Raises:
      StoreError: a place without a bucket, or with "?" or "#", which are no part of names.
    """
    if not is_remote(path):
        return Path(path)
    parts = urlsplit(os.fspath(path))
    if not parts.netloc or parts.query or parts.fragment:
        raise StoreError(
            f"{os.fspath(path)} is no place on an object store: expected "
            f"{parts.scheme}://bucket/name, without '?' and '#'"
        )
    return RemotePath(os.fspath(path))


def each(
    path: Path | RemotePath, call: Callable[[_One], _Found], items: Iterable[_One]
) -> list[_Found]:
    """`call` of each item, in order; where `path` is on an object store, many side by side.

    Raises what the first call raises that does.
    """
    if not isinstance(path, RemotePath):
        return [call(item) for item in items]
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(call, items))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names a place on an object store."""
    return urlsplit(os.fspath(path)).scheme in SCHEMES


def absolute(path: str | os.PathLike) -> str:
    """The same place from whatever folder it is looked at."""
    return os.fspath(path) if is_remote(path) else str(Path(path).resolve())


@dataclass(frozen=True)
class RemotePath:
    """A name on an object store, with as much of `pathlib.Path` as stores need."""

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
        path = (parts.path.strip("/") + "/").lstrip("/")  # nothing, of a whole bucket
        if parts.scheme == "gs":
            retries = {"gcs_request_retries": _RETRIES}
            return {"driver": "gcs", "bucket": parts.netloc, "path": path, **retries}
        spec: dict[str, Any] = {"driver": "s3", "bucket": parts.netloc, "path": path}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
        if "AWS_ACCESS_KEY_ID" in os.environ:
            spec["aws_credentials"] = {"type": "environment"}
        # Without it a condition on a write is looked at before the write, and not by it.
        return {**spec, "s3_request_retries": _RETRIES, "use_conditional_write": True}

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
        with _as_os_error(self.url):
            found = self._folder().read(self.name, byte_range=slice(start, stop)).result()
        if found.state != "value":
            raise FileNotFoundError(f"{self.url} does not exist")
        return found.value

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object as text. Raises as `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def read_stamped(self) -> tuple[bytes | None, bytes]:
        """The object's bytes, None where there is none, and its generation, for `write_bytes`.

        Raises:
          OSError: it cannot be read, also not by trying again.
        """
        with _as_os_error(self.url):
            found = self._folder().read(self.name).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def write_bytes(self, data: bytes, if_equal: bytes | None = None) -> bytes:
        """Writes the object, all or nothing.

        Args:
          data: its new content.
          if_equal: the generation that is to be there (`read_stamped`); nothing is written over
            another one.

        Returns:
          The new generation; `b""` if nothing was written.

        Raises:
          OSError: it cannot be written, also not by trying again.
        """
        with _as_os_error(self.url):
            return self._folder().write(self.name, data, if_equal=if_equal).result().generation

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly below this name: objects, and what would be folders. Raises OSError."""
        return (self / name for name in dict.fromkeys(k.split("/")[0] for k in self._keys()))

    def rmtree(self, names: Collection[str]) -> None:
        """Deletes all objects below `names`, which are below this one. Raises OSError."""
        doomed = [k for k in self._keys() if k.split("/")[0] in names] if names else []
        with _as_os_error(self.url):
            below = self._below()
            for pending in [below.write(key, None) for key in doomed]:
                pending.result()

    def _keys(self) -> list[str]:
        with _as_os_error(self.url):
            return [key.decode() for key in self._below().list().result()]

    def _folder(self) -> Any:
        """The tensorstore key-value store that this name is in. Raises ValueError."""
        return RemotePath(self.url.rstrip("/").rsplit("/", 1)[0])._below()

    def _below(self) -> Any:
        """The tensorstore key-value store of everything below this name. Raises ValueError."""
        import tensorstore as ts

        return ts.KvStore.open(self.kvstore()).result()


@contextlib.contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Tensorstore's failures as what `pathlib` raises."""
    try:
        yield
    except (ValueError, NotImplementedError) as err:
        raise OSError(f"{url}: {str(err)[:300]}") from err
