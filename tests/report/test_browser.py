"""The page in a real browser: what it shows, and that it asks the network for nothing."""

import http.server
import shutil
import subprocess
import threading

import pytest
from pages import HOSTILE, Seen, hostile_page

from saex.report import save

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


@pytest.fixture
def served(tmp_path):
    """(address of a folder, paths asked for so far)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def browse(tmp_path, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    out = subprocess.run(
        [*command, profile, *arguments], capture_output=True, timeout=120, check=True
    )
    return out.stdout.decode("utf-8")


def test_the_page_shows_everything_and_fetches_nothing(tmp_path, served):
    address, asked = served
    page, highlighted = hostile_page()
    save(tmp_path / "report.html", page)
    picture = tmp_path / "page.png"
    dom = Seen(browse(tmp_path, "--dump-dom", f"{address}/report.html"))
    assert asked == ["/report.html"]
    assert dom.title == HOSTILE[2]  # no script ran: it would have changed the title
    assert dom.classes.count(("article", "latent")) == 5
    assert dom.classes.count(("div", "ctx")) == 15
    assert dom.spans() == highlighted
    assert not {"script", "img", "iframe", "object"} & set(dom.tags)
    browse(tmp_path, "--window-size=400,1600", f"--screenshot={picture}", f"{address}/report.html")
    assert picture.stat().st_size > 20_000  # an empty page is a few hundred bytes
