"""A stand-in for the Hugging Face hub on loopback: as much of it as huggingface_hub asks for.

Model info with checksums, files with ETag, commit and ranges, and commits with large files. It can
be told to break connections and to damage what it sends.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".pth", ".ckpt")  # kept with their SHA-256, as the hub keeps such files


@dataclass
class Hub:
    """repos: of each, its files. requests: (method, path, range) of each, in order.

    cut: how many bytes to send before the connection breaks, one entry a GET. stall: how many to
    send before nothing comes any more. damaged: names whose content has a wrong byte on the way.
    ignore_ranges: answer with the whole file.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    stall: int | None = None
    damaged: set[str] = field(default_factory=set)
    ignore_ranges: bool = False
    large: dict[str, bytes] = field(default_factory=dict)
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
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        page = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + page)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse("Unauthorized", "who are you?", status=401)
        for method, pattern, reply in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return reply(self, body, *match.groups())
        return self.refuse("EntryNotFound", f"no such page: {self.command} {path}")

    def send(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200, **headers):
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, code: str, message: str, status: int = 404):
        self.send_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        if repo not in self.hub.repos:
            self.refuse("RepoNotFound", f"no repository {repo}")
        elif revision not in (None, "main", COMMIT):
            self.refuse("RevisionNotFound", f"no revision {revision}")
        else:
            return self.hub.repos[repo]
        return None

    def info(self, _body, repo: str, revision: str | None):
        files = self.files(repo, revision)
        if files is None:
            return
        siblings = []
        for name, content in files.items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if name.endswith(LARGE):
                oid = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": oid, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings})

    def tree(self, _body, repo: str, revision: str):
        files = self.files(repo, revision)
        if files is not None:
            found = {name: (len(content), git_blob(content)) for name, content in files.items()}
            items = [{"path": n, "size": size, "oid": oid} for n, (size, oid) in found.items()]
            self.send_json([item | {"type": "file"} for item in items])

    def resolve(self, _body, repo: str, revision: str, name: str):
        files = self.files(repo, revision)
        if files is None:
            return None
        if name not in files:
            return self.refuse("EntryNotFound", f"no {name}")
        content = files[name]
        large = name.endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else git_blob(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if name in self.hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not asked or self.hub.ignore_ranges:
            return self.send_part(content, 200, headers)
        start, total = int(asked[1]), len(content)
        headers["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        return self.send_part(content[start:], 206, headers)

    def send_part(self, content: bytes, status: int, headers: dict[str, str]):
        if self.command == "HEAD" or not (self.hub.cut or self.hub.stall):
            return self.send(content, status, **headers)
        kept = content[: self.hub.stall or self.hub.cut.pop(0)]
        self.send(kept, status, Content_Length=len(content), **headers)
        while self.hub.stall:
            sleep(0.05)
        self.close_connection = True
        return None

    def create(self, body, *_):
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.hub.repos.setdefault(repo, {})
        self.send_json({"url": f"{self.hub.url}/{repo}", "id": repo})

    def preupload(self, body, _repo):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        found = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
        self.send_json({"files": found})

    def batch(self, body, _repo):
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid: str):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.send(b"")

    def commit(self, body, repo: str):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.large[value["oid"]]
        page = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": page})

    def agree(self, _body):
        self.send_json({"errors": [], "warnings": []})


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", f"/api/models/{NAME}(?:/revision/([^/]+))?", Answers.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Answers.tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Answers.resolve),
    ("POST", "/api/repos/create", Answers.create),
    ("POST", "/api/validate-yaml", Answers.agree),
    ("POST", f"/api/models/{NAME}/preupload/main", Answers.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Answers.batch),
    ("PUT", "/large/([0-9a-f]+)", Answers.upload),
    ("POST", f"/api/models/{NAME}/commit/main", Answers.commit),
]
