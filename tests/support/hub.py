"""A stand-in for the Hugging Face hub: one folder of repositories, served over HTTP.

It answers what `huggingface_hub` asks when it lists and downloads a model: /api/models/NAME/...,
and HEAD and GET of /NAME/resolve/REVISION/FILE, parts of files included.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """
import importlib, sys
for line in sys.argv[1:]:
    sys.argv = line.split()
    try:
        importlib.import_module(sys.argv[0]).main()
    except SystemExit as stopped:
        print("exit status", stopped.code, file=sys.stderr)
"""


class Hub(ThreadingHTTPServer):
    """Serves root/OWNER/NAME/... as revision `main`; `served` lists (path, first byte) of GETs."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.served = []
        self.cut = set()  # files whose connection breaks once, half way
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """Returns the environment of a process for which this is the hub."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1" if offline else "0",
        }

    def run(self, home: Path, *command_lines: str, offline: bool = False) -> str:
        """Runs `MODULE ARGUMENTS` lines, this as the hub and home as its cache; returns stderr."""
        done = subprocess.run(
            [sys.executable, "-c", RUN, *command_lines],
            cwd=ROOT,
            env=self.environment(home, offline),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stderr


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serves a folder of repositories as long as the block runs."""
    server = Hub(root)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: dict | list, **headers: str):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def not_found(self, code: str):
        self.answer(404, {}, X_Error_Code=code, X_Error_Message="not found")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if model:
            self.describe(*model.groups())
        elif file:
            self.send_file(*file.groups())
        else:
            self.not_found("RepoNotFound")

    def describe(self, name: str, what: str | None, revision: str | None):
        folder = self.server.root / name
        if not folder.is_dir():
            return self.not_found("RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.not_found("RevisionNotFound")

        content = {"id": name, "sha": COMMIT, "siblings": []}
        tree = []
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                path = str(file.relative_to(folder))
                content["siblings"].append({"rfilename": path})
                size = file.stat().st_size
                tree.append({"type": "file", "path": path, "size": size, "oid": etag(file)})
        if what == "tree":
            content = tree
        self.answer(200, content, Content_Type="application/json")

    def send_file(self, name: str, revision: str, file: str):
        path = self.server.root / name / file
        if not path.is_file():
            return self.not_found("EntryNotFound")

        size = path.stat().st_size
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0"))[1])
        headers = {
            "ETag": f'"{etag(path)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(size - start),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if start else 200)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.send_content(path, file, start, left=size - start)

    def send_content(self, path: Path, file: str, start: int, left: int):
        self.server.served.append((file, start))
        if file in self.server.cut:
            self.server.cut.remove(file)
            left //= 2
            self.close_connection = True

        with open(path, "rb") as opened:
            opened.seek(start)
            while left > 0:
                left -= self.wfile.write(opened.read(min(left, 1 << 20)))


def etag(path: Path) -> str:
    """A name for the content."""
    digest = hashlib.sha1(str(path).encode())
    digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
