"""A stand-in for the Hugging Face hub: one folder of repositories, served over HTTP.

It answers what `huggingface_hub` asks when it lists and downloads a model: /api/models/NAME/...,
and HEAD and GET of /NAME/resolve/REVISION/FILE, parts of files included.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves root/OWNER/NAME/... as revision `main`; `served` lists (path, first byte) of GETs."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.served = root, []
        self.cut = set()  # files whose connection breaks once, half way
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
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
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(*match.groups())
        else:
            self.not_found("RepoNotFound")

    def describe(self, name: str, what: str | None, revision: str | None):
        folder = self.server.root / name
        if not folder.is_dir():
            return self.not_found("RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.not_found("RevisionNotFound")
        files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        names = [str(f.relative_to(folder)) for f in files]
        if what == "tree":
            content = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": etag(f)}
                       for n, f in zip(names, files)]
        else:
            content = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        self.answer(200, content, Content_Type="application/json")

    def send_file(self, name: str, revision: str, file: str):
        path = self.server.root / name / file
        if not path.is_file():
            return self.not_found("EntryNotFound")
        size = path.stat().st_size
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0"))[1])
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
                   "Content-Length": str(size - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if start else 200)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.server.served.append((file, start))
            left = size - start
            if file in self.server.cut:
                self.server.cut.remove(file)
                left, self.close_connection = left // 2, True
            with open(path, "rb") as opened:
                opened.seek(start)
                while left > 0:
                    left -= self.wfile.write(opened.read(min(left, 1 << 20)))


def etag(path: Path) -> str:
    """A name for the content."""
    digest = hashlib.sha1(str(path).encode())
    digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
