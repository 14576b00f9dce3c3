"""A stand-in for the Hugging Face hub on loopback: as much of it as downloads ask for."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = r"([^/]+/[^/]+)"
INFO, TREE = rf"/api/models/{NAME}(?:/revision/([^/]+))?", rf"/api/models/{NAME}/tree/([^/]+)"
FILE = rf"/{NAME}/resolve/([^/]+)/(.+)"


@dataclass
class Hub:
    """repos: of each, its files. requests: (method, path, range) of each, in order.

    cut: how many bytes to send before the connection breaks, one entry a GET.
    damaged: names whose content has a wrong byte on the way.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    url: str = ""

    def ranges(self, name: str) -> list[str | None]:
        """The ranges that were asked of a file, None for all of it."""
        asked = [(path, range_) for method, path, range_ in self.requests if method == "GET"]
        return [range_ for path, range_ in asked if path.endswith(f"/{COMMIT}/{name}")]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def in_place_of_the_hub(monkeypatch) -> Iterator[Hub]:
    """In this process the stand-in is the hub: the library reads its address at every request."""
    with running(Hub()) as hub:

        def upload(_, repo_id: str, folder_path: Path, **others) -> str:
            hub.repos[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            return f"{hub.url}/{repo_id}"

        monkeypatch.setattr(HfApi, "upload_folder", upload)
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **named: SimpleNamespace(**named))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        page = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + page)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


class Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        kind = next((p for p in (TREE, INFO, FILE) if re.fullmatch(p, path)), None)
        repo, revision, *name = re.fullmatch(kind, path).groups() if kind else ("", None)
        files = self.hub.repos.get(repo, {})
        if repo not in self.hub.repos:
            self.refuse("RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.refuse("RevisionNotFound")
        elif name and name[0] not in files:
            self.refuse("EntryNotFound")
        elif name:
            self.send_file(name[0], files[name[0]])
        else:
            key = {TREE: "path", INFO: "rfilename"}[kind]
            items = [{"type": "file", key: name} | about(files[name]) for name in files]
            answer = items if kind == TREE else {"id": repo, "sha": COMMIT, "siblings": items}
            self.send(json.dumps(answer).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str):
        self.send(b"{}", 404, X_Error_Code=code, X_Error_Message=code)

    def send_file(self, name: str, content: bytes):
        headers = {"ETag": f'"{about(content)["lfs"]["sha256"]}"', "X_Repo_Commit": COMMIT}
        total, is_damaged = len(content), name in self.hub.damaged
        content = bytes([content[0] ^ is_damaged]) + content[1:]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if start:
            headers["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        content = content[start:]
        headers["Content_Length"] = len(content)
        if self.command == "GET" and self.hub.cut:
            content, self.close_connection = content[: self.hub.cut.pop(0)], True
        self.send(content, 206 if start else 200, **headers)


def about(content: bytes) -> dict:
    """What the hub says of a file's content: all of them are large ones, with their SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    large = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 134}
    return {"size": len(content), "blobId": digest[:40], "oid": digest[:40], "lfs": large}
