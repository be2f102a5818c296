"""A Hub of one process on the loopback address, for the real huggingface_hub client: repositories in memory.

It serves what loading and publishing ask for: a repository's information and files (whole or in ranges), branches, and
commits of small files and of large ones by LFS. Object ids are true (git's sha1 of a blob, sha256 of a large file), so
that the client's checks and its "nothing changed" are real. On request it is busy, cuts connections, stalls, or takes
a large file for another.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[2]
LARGE = (".safetensors",)  # what the Hub would keep in LFS
WITHOUT_HUBGEN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hubgen":
            raise ModuleNotFoundError("No module named 'hubgen'", name="hubgen")

sys.meta_path.insert(0, Missing())
"""
"""The head of a program for which hubgen is not installed"""


@dataclass
class Trouble:
    """Something that goes wrong."""

    meant: str
    """pattern of method and path"""
    times: int = 1
    status: int = 0
    """that is answered; 0 cuts the connection"""
    retry_after: str = ""
    stall: float = 0.0
    """seconds before the answer"""
    wrong: bool = False
    """whether a large file arrives as another one"""


@dataclass
class Hub:
    """Its repositories by owner/name, with datasets/ or spaces/ before it if they are that: each a file by its path."""

    url: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """large files by sha256"""
    requests: list[str] = field(default_factory=list)
    """method and path of everything that was asked for"""
    trouble: list[Trouble] = field(default_factory=list)
    """what goes wrong with the next requests that it means"""
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    """what the client said of each repository that it made"""
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    """of each commit its repository, branch, message and the paths of its files"""
    token: str | None = None
    """that requests which change something have to bring; any if not given"""

    def add(self, repo: str, folder: Path) -> None:
        """Puts a folder's files in a repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repos[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit(self, repo: str) -> str:
        """The id of a repository's present state."""
        content = "".join(f"{name}{oid(data)}" for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content.encode()).hexdigest()


def environment_of(hub: Hub, home: Path | str, token: str | None = "hf_test") -> dict[str, str]:
    """Of a process that knows this Hub and no other, with a cache of its own: the client reads these when imported."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        **({} if token is None else {"HF_TOKEN": token}),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def known_as(name: str, data: bytes | None) -> str | None:
    """What a client compares its file with, to see whether it changed."""
    if data is None:
        return None
    return sha256(data) if name.endswith(LARGE) else oid(data)


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
        if self.troubled(f"{self.command} {path}"):
            return None
        if self.hub.token and self.command in ("POST", "DELETE") and not self.allowed():
            return self.refuse("Unauthorized", "the token is none that may write", status=401)
        api, one = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)", r"/((?:datasets/|spaces/)?[^/]+/[^/]+)"
        for pattern, handle in (
            (r"/api/whoami-v2", self.who_am_i),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda: self.answer({"errors": [], "warnings": []})),
            (rf"{api}(?:/revision/[^/]+)?", self.information),
            (rf"{api}/tree/[^/]+(?:/(.+))?", self.tree),
            (rf"{api}/paths-info/[^/]+", self.paths_info),
            (rf"{api}/branch/(.+)", self.branch),
            (rf"{api}/preupload/[^/]+", self.preupload),
            (rf"{api}/commit/([^/]+)", self.commit),
            (rf"{one}/resolve/([^/]+)/(.+)", self.resolve),
            (rf"{one}\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/lfs/([0-9a-f]{64})", self.lfs_put),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                found = list(match.groups())
                if pattern.startswith(api):
                    kind = found.pop(0)
                    found[0] = found[0] if kind == "models" else f"{kind}/{found[0]}"
                if found and "/" in found[0] and found[0] not in self.hub.repos:
                    return self.refuse("RepoNotFound", f"no repository {found[0]}")
                return handle(*found)
        self.refuse("EntryNotFound", f"no endpoint {self.command} {path}")

    def troubled(self, asked: str) -> bool:
        """Whether something went wrong with this request, which then has its answer, or none."""
        for trouble in self.hub.trouble:
            if trouble.times and re.search(trouble.meant, asked):
                trouble.times -= 1
                time.sleep(trouble.stall)
                if trouble.wrong:
                    self.body += b"damaged"
                    return False
                if trouble.status:
                    headers = {"Retry-After": trouble.retry_after} if trouble.retry_after else {}
                    self.refuse("Busy", "try again later", headers, trouble.status)
                elif not trouble.stall:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                return bool(trouble.status) or not trouble.stall
        return False

    def allowed(self) -> bool:
        """Whether the request brings the token that may write; large files need none, and ask before they are sent."""
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def branch(self, repo: str, name: str) -> None:
        known = self.hub.branches.setdefault(repo, [])
        exists = name in known
        known += [] if exists else [name]
        self.answer({}, status=409 if exists else 200)

    def information(self, repo: str) -> None:
        files = self.hub.repos[repo]
        siblings = [{"rfilename": name} for name in files]
        self.answer({"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": []})

    def tree(self, repo: str, folder: str | None = None) -> None:
        everything = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        inside = "" if folder is None else f"{folder}/"
        entries = [one for path, one in self.entries(repo).items() if path.startswith(inside)]
        if not entries and inside:
            return self.refuse("EntryNotFound", f"no folder {folder} in {repo}")
        self.answer([one for one in entries if everything or "/" not in one["path"][len(inside) :]])

    def paths_info(self, repo: str) -> None:
        asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        known = self.entries(repo)
        self.answer([known[path] for path in asked if path in known])

    def entries(self, repo: str) -> dict[str, dict[str, Any]]:
        """What the Hub says of each file and folder, by path."""
        rows: dict[str, dict[str, Any]] = {}
        for name, data in self.hub.repos[repo].items():
            for parent in [*Path(name).parents][:-1]:
                rows[parent.as_posix()] = {"type": "directory", "path": parent.as_posix(), "size": 0, "oid": oid(b"")}
            rows[name] = {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
            if name.endswith(LARGE):
                rows[name]["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return rows

    def resolve(self, repo: str, revision: str, name: str) -> None:
        data = self.hub.repos[repo].get(name)
        if data is None:
            return self.refuse("EntryNotFound", f"no file {name} in {repo}", {"X-Repo-Commit": self.hub.commit(repo)})
        headers = {
            "X-Repo-Commit": self.hub.commit(repo),
            "ETag": f'"{known_as(name, data)}"',
            "Accept-Ranges": "bytes",
        }
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
        kind = asked.get("type") or "model"
        repo = repo if kind == "model" else f"{kind}s/{repo}"
        exists = repo in self.hub.repos
        self.hub.created.setdefault(repo, asked)
        self.hub.repos.setdefault(repo, {})
        self.answer({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}, status=409 if exists else 200)

    def preupload(self, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": known_as(file["path"], self.hub.repos[repo].get(file["path"])),
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

    def commit(self, repo: str, branch: str) -> None:
        files = self.hub.repos[repo]
        rows = [json.loads(line) for line in self.body.splitlines()]
        said = next(row["value"] for row in rows if row["key"] == "header")
        paths = [row["value"]["path"] for row in rows if row["key"] != "header"]
        request = "create_pr=1" in self.path
        self.hub.commits.append(
            {"repo": repo, "branch": branch, "message": said["summary"], "paths": paths, "pull_request": request}
        )
        if request:
            url = f"{self.hub.url}/{repo}"
            made = {"success": True, "commitUrl": f"{url}/commit/0", "commitOid": "0" * 40}
            return self.answer({**made, "pullRequestUrl": f"{url}/discussions/1"})
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
