"""A small Hub on this machine: enough of its HTTP interface for huggingface_hub to create, upload,
download and fail.

    with running() as hub: …    hub.url, hub.repos, hub.requests, hub.faults

`hub.faults` is a list of Fault; the first that fits a request and has not been used up is applied
instead of the answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

TOKEN, USER = "hf_test", "tester"
LARGE = 1 << 20  # bytes from which a file is large; *.safetensors always is


@dataclass
class Fault:
    """`status` as the answer, or with `cut` a connection closed after so many bytes of the
    request's body.
    """

    method: str
    path: str  # a regular expression
    status: int = 0
    cut: int | None = None
    times: int = 1000


@dataclass
class Repo:
    private: bool = False
    commits: list[dict[str, Any]] = field(
        default_factory=lambda: [{"sha": "0" * 40, "files": {}, "message": "initial"}]
    )
    pulls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]["files"]

    def at(self, revision: str) -> dict[str, Any] | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next(
            (commit for commit in self.commits + self.pulls if commit["sha"] == revision), None
        )


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(
        default_factory=dict
    )  # large files that have arrived, by SHA-256
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def sent(self, method: str, path: str) -> int:
        """How many requests of this kind have come."""
        return sum(used == method and bool(re.search(path, where)) for used, where in self.requests)


class RefusalError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def is_large(name: str, size: int) -> bool:
    return name.endswith(".safetensors") or size >= LARGE


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if is_large(name, len(content)):
        entry["lfs"] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
    return entry


def card_data(files: dict[str, bytes]) -> dict[str, Any]:
    """The metadata of README.md, as the Hub keeps it; raises ValueError where it is malformed."""
    import yaml

    match = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.S)
    return yaml.safe_load(match[1]) if match else {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    # --- plumbing

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self, most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if most is not None and sum(map(len, parts)) >= most:
                    break
            else:
                self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if most is None else min(length, most))

    def handle_one(self) -> None:
        address = urlparse(self.path)
        path = unquote(address.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = self.hub.fault(self.command, path)
        if fault and fault.cut is not None:
            self.read_body(fault.cut)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.read_body()
        if fault:
            self.answer(
                fault.status,
                {"error": f"as asked: {fault.status}"},
                X_Error_Message=f"as asked: {fault.status}",
            )
            return
        with self.hub.lock:
            try:
                self.route(path, parse_qs(address.query), body)
            except RefusalError as refusal:
                self.answer(
                    refusal.status,
                    {"error": str(refusal)},
                    X_Error_Code=refusal.code,
                    X_Error_Message=str(refusal),
                )

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815  # the names that http.server calls

    # --- the interface

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        routes = [
            (r"/api/validate-yaml", self.validate),
            (r"/api/repos/create", self.create),
            (r"/api/models/([^/]+/[^/]+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/.+", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/.+", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/objects/([0-9a-f]{64})", self.store),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, handler in routes:
            if match := re.fullmatch(pattern, path):
                handler(*match.groups(), query=query, body=body)
                return
        raise RefusalError(404, "NotFound", f"{self.command} {path} is not part of this Hub")

    def require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "InvalidToken", "Invalid username or password.")

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (
            repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        return repo

    def validate(self, *, query: Any, body: bytes) -> None:
        from huggingface_hub.repocard_data import model_index_to_eval_results

        try:
            metadata = card_data({"README.md": json.loads(body)["content"].encode()})
            if "model-index" in metadata:
                model_index_to_eval_results(metadata["model-index"])
        except Exception as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def create(self, *, query: Any, body: bytes) -> None:
        self.require_token()
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        name = f"{owner}/{asked['name']}"
        if owner != USER:
            raise RefusalError(
                403,
                "Forbidden",
                f'You don\'t have the rights to create a model under the namespace "{owner}"',
            )
        if name in self.hub.repos:
            self.answer(
                409,
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"},
            )
            return
        self.hub.repos[name] = Repo(
            private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str = "main", *, query: Any, body: bytes) -> None:
        repo = self.repo(name)
        commit = repo.at(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        siblings = [described(file, content) for file, content in sorted(commit["files"].items())]
        found = {
            "_id": name,
            "id": name,
            "modelId": name,
            "author": USER,
            "sha": commit["sha"],
            "private": repo.private,
        }
        found |= {
            "disabled": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self.answer(200, {**found, "cardData": card_data(commit["files"])})

    def tree(self, name: str, revision: str, *, query: Any, body: bytes) -> None:
        commit = self.repo(name).at(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        rows = []
        for file, content in sorted(commit["files"].items()):
            row = described(file, content)
            lfs = (
                {"lfs": {"oid": row["lfs"]["sha256"], "size": row["size"], "pointerSize": 130}}
                if "lfs" in row
                else {}
            )
            rows.append(
                {"type": "file", "path": file, "size": row["size"], "oid": row["blobId"], **lfs}
            )
        self.answer(200, rows)

    def preupload(self, name: str, *, query: Any, body: bytes) -> None:
        self.require_token()
        files = self.repo(name).files
        modes = []
        for entry in json.loads(body)["files"]:
            here = files.get(entry["path"])
            mode = "lfs" if is_large(entry["path"], entry["size"]) else "regular"
            oid = (
                None
                if here is None
                else hashlib.sha256(here).hexdigest()
                if mode == "lfs"
                else blob_id(here)
            )
            modes.append(
                {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer(200, {"files": modes})

    def batch(self, name: str, *, query: Any, body: bytes) -> None:
        self.require_token()
        self.repo(name)
        answers = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}", "header": {}}}
            answers.append(
                {**wanted, **({} if wanted["oid"] in self.hub.objects else {"actions": upload})}
            )
        self.answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str, *, query: Any, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "BadHash", "the content does not have this hash")
        self.hub.objects[oid] = body
        self.answer(200)

    def commit(self, name: str, *, query: dict[str, list[str]], body: bytes) -> None:
        self.require_token()
        repo = self.repo(name)
        files, head = dict(repo.files), {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                head = value
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusalError(400, "Missing", f"{value['path']} has not been uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        if head.get("parentCommit") and head["parentCommit"] != repo.commits[-1]["sha"]:
            raise RefusalError(412, "PreconditionFailed", "A commit has happened since.")
        pull = bool(query.get("create_pr"))
        sha = hashlib.sha1(f"{name} {len(repo.commits)} {len(repo.pulls)}".encode()).hexdigest()
        (repo.pulls if pull else repo.commits).append(
            {"sha": sha, "files": files, "message": head.get("summary", "")}
        )
        url = f"{self.hub.url}/{name}/discussions/{len(repo.pulls)}" if pull else None
        commit_url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer(
            200, {"success": True, "commitOid": sha, "commitUrl": commit_url, "pullRequestUrl": url}
        )

    def resolve(self, name: str, revision: str, file: str, *, query: Any, body: bytes) -> None:
        commit = self.repo(name).at(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        if file not in commit["files"]:
            self.answer(
                404,
                {"error": "Entry not found"},
                X_Error_Code="EntryNotFound",
                X_Repo_Commit=commit["sha"],
            )
            return
        content = commit["files"][file]
        row = described(file, content)
        headers = {
            "ETag": f'"{row["lfs"]["sha256"] if "lfs" in row else row["blobId"]}"',
            "X-Repo-Commit": commit["sha"],
        }
        headers |= {"Accept-Ranges": "bytes", "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], **headers)
            return
        self.answer(200, content, **headers)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
