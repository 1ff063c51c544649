"""A loopback server that speaks the part of the Hub's protocol that fetching a pinned repository needs.

Serves the files of a folder as `{root}/{models,datasets}/{owner}/{name}/…` at one revision. What asks it is the real
client (`huggingface_hub`, `datasets`), pointed here by HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

REVISION = "0123456789abcdef0123456789abcdef01234567"
EXPIRED = "hf_expired"  # a token that is refused, for public repositories too, as the Hub does

_API = re.compile(r"^/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/?]+)/?([^?]*)")
_RESOLVE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


class _Handler(BaseHTTPRequestHandler):
    root: Path
    seen: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.seen.append(f"{self.command} {self.path}")
        if self.path == "/":
            return self._send(b"", body)
        if self.headers.get("Authorization") == f"Bearer {EXPIRED}":
            reason = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._send(b"{}", body, reason, status=401)
        if match := _API.match(self.path):
            kind, repo, what, revision, below = match.groups()
            return self._repository(self.root / kind / repo, repo, what, revision, below, body)
        if match := _RESOLVE.match(self.path):
            dataset, repo, revision, name = match.groups()
            folder = self.root / ("datasets" if dataset else "models") / repo
            if self._known(folder, revision, body):
                file = folder / name
                if not file.is_file():
                    return self._fail("EntryNotFound", body)
                self._send(file.read_bytes(), body, {"X-Repo-Commit": REVISION, "ETag": f'"{_oid(file)}"'})
            return None
        return self._fail("RepoNotFound", body)

    def _repository(self, folder: Path, repo: str, what: str, revision: str, below: str, body: bool) -> None:
        if not self._known(folder, revision, body):
            return
        if what == "revision":
            names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
            siblings = [{"rfilename": name} for name in names]
            value: object = {
                "_id": "0",
                "id": repo,
                "sha": REVISION,
                "private": False,
                "siblings": siblings,
                "tags": [],
            }
        elif what == "tree":
            place = folder / below
            if not place.is_dir():
                return self._fail("EntryNotFound", body)
            found = place.rglob("*") if "recursive=true" in self.path.lower() else place.iterdir()
            value = [_entry(folder, path) for path in sorted(found)]
        else:
            wanted = (folder / name for name in parse_qs(self.posted.decode()).get("paths", []))
            value = [_entry(folder, path) for path in wanted if path.exists()]
        self._send(json.dumps(value).encode(), body, {"Content-Type": "application/json"})

    def _known(self, folder: Path, revision: str, body: bool) -> bool:
        if not folder.is_dir():
            self._fail("RepoNotFound", body)
            return False
        if revision != REVISION:
            self._fail("RevisionNotFound", body)
            return False
        return True

    def _fail(self, code: str, body: bool) -> None:
        self._send(b"{}", body, {"X-Error-Code": code}, status=404)

    def _send(self, data: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _entry(folder: Path, path: Path) -> dict[str, str | int]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`; yields the endpoint's address and the list of requests as they come in."""
    seen: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
