"""A Hub of one process on the loopback address, for the real huggingface_hub client: repositories of models, in memory.

It serves what loading and publishing a pipeline ask for: a repository's information and files (whole or in ranges),
and commits of small files and of large ones by LFS. Object ids are true (git's sha1 of a blob, sha256 of a large file),
so that the client's checks and its "nothing changed" are real.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)  # what the Hub would keep in LFS


@dataclass
class Hub:
    """Its repositories by owner/name, each a file by its path."""

    url: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """large files by sha256"""
    requests: list[str] = field(default_factory=list)
    """method and path of everything that was asked for"""

    def add(self, repo: str, folder: Path) -> None:
        """Puts a folder's files in a repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repos[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit(self, repo: str) -> str:
        """The id of a repository's present state."""
        content = "".join(f"{name}{oid(data)}" for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content.encode()).hexdigest()


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A running Hub; `HF_ENDPOINT` is to be its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        self.hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, handle in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.information),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/api/whoami-v2", self.who_am_i),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda: self.answer({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/lfs/([0-9a-f]{64})", self.lfs_put),
            (r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.commit),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                repo = match[1] if match.groups() else None
                if repo and "/" in repo and repo not in self.hub.repos:
                    return self.refuse("RepoNotFound", f"no repository {repo}")
                return handle(*match.groups())
        self.refuse("EntryNotFound", f"no endpoint {self.command} {path}")

    def information(self, repo: str) -> None:
        files = self.hub.repos[repo]
        siblings = [{"rfilename": name} for name in files]
        self.answer({"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": []})

    def tree(self, repo: str) -> None:
        rows: list[dict[str, Any]] = []
        for name, data in self.hub.repos[repo].items():
            rows.append({"type": "file", "path": name, "size": len(data), "oid": oid(data)})
            if name.endswith(LARGE):
                rows[-1]["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        self.answer(rows)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        data = self.hub.repos[repo].get(name)
        if data is None:
            return self.refuse("EntryNotFound", f"no file {name} in {repo}", {"X-Repo-Commit": self.hub.commit(repo)})
        etag = sha256(data) if name.endswith(LARGE) else oid(data)
        headers = {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not part:
            return self.answer(data, headers)
        first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(data[first : last + 1], headers, status=206)

    def who_am_i(self) -> None:
        self.answer({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        exists = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {})
        self.answer({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}, status=409 if exists else 200)

    def preupload(self, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid(self.hub.repos[repo][file["path"]]) if file["path"] in self.hub.repos[repo] else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.uploads:
                asked["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, digest: str) -> None:
        if sha256(self.body) != digest:
            return self.refuse("BadRequest", "the bytes are not those announced", status=400)
        self.hub.uploads[digest] = self.body
        self.answer({})

    def commit(self, repo: str) -> None:
        files = self.hub.repos[repo]
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo)
        self.answer({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def refuse(self, code: str, message: str, headers: dict[str, str] | None = None, status: int = 404) -> None:
        errors = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.answer({"error": message}, errors, status)

    def answer(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
