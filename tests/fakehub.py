"""A stand-in for the Hugging Face Hub on the loop-back address: reads, LFS, commits, faults.

    with FakeHub() as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
        hub.faults.append({"match": "safetensors", "mode": "cut"})

and in the client's environment HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1 (uploads then use plain LFS).

`hub.log` lists the requests as (method, path, headers). A fault is a dictionary: `match` (regular expression on the
path), `mode` (cut | reset | flip | stall | an HTTP status), `at` (byte, default the middle), `times` (default 1),
`methods` (default GET), `seconds` (of a stall, default 30).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > 10 << 20


def under(path: str, folder: str) -> bool:
    return folder in (path, *map(str, PurePosixPath(path).parents))


class Repo:
    """Commits (commit id → path → content) and branches (name → commit id)."""

    def __init__(self, repo_id: str, private: bool = False):
        self.id, self.private, self.commits, self.refs = repo_id, private, {}, {}

    def commit(self, tree: dict[str, bytes], ref: str = "main") -> str:
        key = repr((self.id, ref, len(self.commits), sorted((path, sha256(data)) for path, data in tree.items())))
        self.refs[ref] = commit_id = hashlib.sha1(key.encode()).hexdigest()
        self.commits[commit_id] = dict(tree)
        return commit_id


class FakeHub:
    """The server and what it holds.

    Args:
        token: If given, writes need it.
        user: Owner of repositories created without one.
        cdn: Send large files by a redirect to another origin, as the real Hub does.
    """

    def __init__(self, token: str | None = None, user: str = "tester", cdn: bool = False):
        self.token, self.user = token, user
        self.repos, self.blobs, self.log, self.faults = {}, {}, [], []
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}" if cdn else None

    def add(self, repo_id: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Commit files on top of what the branch holds; the commit id."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        self.blobs.update((sha256(data), data) for data in files.values())
        return repo.commit({**repo.commits.get(repo.refs.get(ref), {}), **files}, ref)

    def requests(self, method: str, pattern: str) -> list[str]:
        """Paths asked for by this method that match the regular expression."""
        return [path for verb, path, _ in self.log if verb == method and re.search(pattern, path)]

    def take_fault(self, method: str, path: str) -> dict | None:
        with self.lock:
            for fault in self.faults:
                left = fault.get("times", 1)
                if left > 0 and method in fault.get("methods", ("GET",)) and re.search(fault["match"], path):
                    fault["times"] = left - 1
                    return fault
        return None

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # an injected cut, or a client that went away
            super().handle()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((self.command, path, dict(self.headers)))
        self.fault = self.hub.take_fault(self.command, path)
        if self.fault and isinstance(self.fault["mode"], int):
            return self.refuse(self.fault["mode"])
        for methods, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                if function.__name__ in WRITES and self.hub.token and self.authorization != f"Bearer {self.hub.token}":
                    return self.refuse(401)
                return function(self, **match.groupdict())
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def reply(self, status: int, body: object = b"", headers: dict | None = None, sent: int | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def refuse(self, status: int, kind: str | None = None, headers: dict | None = None) -> None:
        """An error; the Hub's X-Error-Code decides which exception the client raises."""
        code = {"X-Error-Code": kind, "X-Error-Message": kind} if kind else {}
        self.reply(status, {"error": kind}, {**code, **(headers or {})})

    def find(self, repo_id: str, revision: str | None = None) -> tuple[Repo | None, str | None]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.authorization):
            self.refuse(404 if self.authorization else 401, "RepoNotFound")
            return None, None
        commit = revision if revision in repo.commits else repo.refs.get(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return None, None
        return repo, commit

    # Reads

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, commit = self.find(repo_id, revision)
        if repo is None:
            return
        data = repo.commits[commit].get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        lfs = is_lfs(path, len(data))
        digest = sha256(data) if lfs else git_sha1(data)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{digest}"'}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(data)}
            if self.hub.cdn:
                return self.reply(302, b"", {"Location": f"{self.hub.cdn}/_cdn/{digest}", **headers})
        self.send_data(data, headers)

    def from_cdn(self, digest: str) -> None:
        self.send_data(self.hub.blobs[digest], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def send_data(self, data: bytes, headers: dict) -> None:
        start, end, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end, status = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else end, end), 206
            if start >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        chunk, fault = data[start:end], self.fault or {}
        mode, at = fault.get("mode"), fault.get("at", (end - start) // 2)
        if mode == "flip":
            chunk = chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :]
        broken = self.command == "GET" and mode in ("cut", "reset", "stall")
        self.reply(status, chunk, {"Content-Type": "application/octet-stream", **headers}, at if broken else None)
        if broken:
            self.hub.closing.wait(fault.get("seconds", 30) if mode == "stall" else 0.2)
            if mode == "reset":  # lingering for no time at all makes close() send RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.rfile.close()
            self.connection.close()

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repo, commit = self.find(repo_id, revision)
        if repo:
            siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
            self.reply(200, {"id": repo_id, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings})

    def list_tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        repo, commit = self.find(repo_id, revision)
        if repo:
            tree = repo.commits[commit]
            self.reply(200, [entry(path, tree[path]) for path in sorted(tree) if not folder or under(path, folder)])

    def whoami(self) -> None:
        if self.authorization != f"Bearer {self.hub.token}":
            return self.refuse(401)
        self.reply(200, {"type": "user", "name": self.hub.user, "orgs": []})

    # Writes

    def create_repo(self) -> None:
        repo_id = f"{self.json.get('organization') or self.hub.user}/{self.json['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self.reply(409, {"url": url, "error": "You already created this model repo"})
        private = self.json.get("visibility") == "private" or bool(self.json.get("private"))
        self.hub.repos[repo_id] = repo = Repo(repo_id, private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.reply(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        valid = self.json["content"].startswith("---")
        self.reply(200, {"errors": [] if valid else [{"message": "no yaml"}], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        repo, commit = self.find(repo_id, revision)
        if repo is None:
            return
        files = []
        for file in self.json["files"]:
            lfs = is_lfs(file["path"], file["size"])
            answer = {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if lfs else "regular"}
            data = repo.commits[commit].get(file["path"])
            if data is not None:  # the oid lets the client skip files that have not changed
                answer["oid"] = sha256(data) if lfs else git_sha1(data)
            files.append(answer)
        self.reply(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for wanted in self.json["objects"]:
            upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}
            verify = {"href": f"{self.hub.url}/_verify", "header": {}}
            known = wanted["oid"] in self.hub.blobs
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, digest: str) -> None:
        if sha256(self.body) != digest:
            return self.refuse(400, "sha256 mismatch")
        self.hub.blobs[digest] = self.body
        self.reply(200, b"", {"ETag": f'"{digest}"'})

    def lfs_verify(self) -> None:
        complete = len(self.hub.blobs.get(self.json["oid"], b"")) == self.json["size"]
        self.reply(200 if complete else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        """Newline-delimited JSON: a header, then operations."""
        repo, parent = self.find(repo_id, revision)
        if repo is None:
            return
        head, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if not parent.startswith(head["value"].get("parentCommit") or ""):
            return self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        tree = dict(repo.commits[parent])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                tree[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                tree = {path: data for path, data in tree.items() if not under(path, value["path"])}
        commit = repo.commit(tree, revision)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})


def entry(path: str, data: bytes) -> dict:
    """One line of a tree listing."""
    lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_lfs(path, len(data)) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data), **lfs}


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (("GET",), r"/_cdn/(?P<digest>[0-9a-f]{64})", Handler.from_cdn),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.list_tree),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create_repo),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/_lfs/(?P<digest>[0-9a-f]{64})", Handler.lfs_put),
    (("POST",), r"/_verify", Handler.lfs_verify),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
]
WRITES = ("create_repo", "preupload", "commit")


@contextlib.contextmanager
def as_endpoint(hub: FakeHub) -> Iterator[FakeHub]:
    """Within it, huggingface_hub in this process talks to `hub`, as HF_ENDPOINT and HF_HUB_DISABLE_XET have it."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
    }
    with hub, mock.patch.multiple(constants, create=True, **settings):  # the last is unknown to old versions
        yield hub
