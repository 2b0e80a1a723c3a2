"""A Hub on the loopback interface: repositories in memory, enough for a push and every way to load.

Those of data sets are called "datasets/user/name".
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Repository:
    """Commits by branch, each a whole tree: path -> content."""

    private: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)  # commits of each, oldest first

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(repr((len(self.trees), sorted(tree.items()))).encode()).hexdigest()
        self.trees[sha], self.messages[sha] = tree, message
        self.branches.setdefault(branch, []).append(sha)
        return sha

    def head(self, revision: str) -> str | None:
        commits = self.branches.get(revision)
        return commits[-1] if commits else revision if revision in self.trees else None


class Hub:
    """The server, running between `with`: `url`, what it holds (`repositories`), and what was asked of it (`log`).

    `POST /control/break/N` makes connections break after N more files or commits, `POST /control/mark/NAME` notes a
    moment in the log.

    Attributes:
        fail_after: how many more files or commits there are until connections break; None for ever.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str, int]] = []  # method, path, bytes that were sent
        self.fail_after: int | None = None
        self.said: list[str] = []  # by those who pushed
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Any) -> dict[str, str]:
        """For a process that uses this Hub, with a cache of its own. The variables are read at import."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }

    def downloads(self, mark: str) -> dict[str, int]:
        """Bytes sent of each file after a mark and before the next, by its path in the repository."""
        sent: dict[str, int] = {}
        marks = [number for number, (method, _, _) in enumerate(self.log) if method == "MARK"]
        start = next(number for number in marks if self.log[number][1] == mark)
        stop = next((number for number in marks if number > start), len(self.log))
        for method, path, size in self.log[start:stop]:
            if method == "GET" and "/resolve/" in path:
                name = path.split("/resolve/")[1].split("/", 1)[1]
                sent[name] = sent.get(name, 0) + size
        return sent

    def breaks(self) -> bool:
        """Count down to the moment when connections break."""
        if self.fail_after is None:
            return False
        self.fail_after -= 1
        if self.fail_after >= 0:
            return False
        self.fail_after = None
        return True


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if (
            parts[0] != "control"
            and path != "/api/validate-yaml"
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.error(401, "Unauthorized", "Invalid username or password.")
        if parts[0] == "control":
            if parts[1] == "break":
                self.hub.fail_after = int(parts[2])
            else:
                self.hub.log.append(("MARK", parts[2], 0))
            return self.answer({})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repository = self.hub.repositories["/".join(parts[2:4])]
        action, revision = parts[4], "/".join(parts[5:])
        if action == "branch":
            repository.branches.setdefault(revision, list(repository.branches["main"]))
            return self.answer({})
        tree = dict(repository.trees[repository.head(revision) or ""])
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": _oid(tree.get(f["path"]))}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit", path
        if self.hub.breaks():
            return self.break_off()
        message = ""
        for line in map(json.loads, body.decode().splitlines()):
            message = line["value"]["summary"] if line["key"] == "header" else message
            if line["key"] == "file":
                tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del tree[line["value"]["path"]]
        sha = repository.commit(revision, tree, message)
        url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        self.get(send=True)

    def do_HEAD(self) -> None:
        self.get(send=False)

    def create(self, wanted: dict[str, Any]) -> None:
        repo_id = "/".join(filter(None, (wanted.get("organization") or "someone", wanted["name"])))
        if repo_id in self.hub.repositories:
            return self.answer(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409
            )
        repository = Repository(private=wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "")
        self.hub.repositories[repo_id] = repository
        self.answer({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def get(self, send: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if "resolve" in parts:
            place = parts.index("resolve")
            if parts[0] == "api":
                return self.error(404, "RepoNotFound", "not found")
            return self.resolve("/".join(parts[:place]), parts[place + 1], "/".join(parts[place + 2 :]), send)
        repo_id = "/".join(parts[1 if parts[1:2] == ["datasets"] else 2 : 4])
        repository = self.hub.repositories.get(repo_id)
        if parts[:2] not in (["api", "models"], ["api", "datasets"]) or repository is None:
            return self.error(404, "RepoNotFound", "Repository not found")
        sha = repository.head(parts[5] if len(parts) > 5 else "main")
        if sha is None:
            return self.error(404, "RevisionNotFound", "Revision not found")
        tree = repository.trees[sha]
        if parts[4:5] == ["tree"]:
            return self.answer(_listed(tree, "/".join(parts[6:]), "recursive=true" in self.path.lower()))
        files = [{"rfilename": path} for path in tree]
        self.answer({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": files})

    def resolve(self, repo_id: str, revision: str, path: str, send: bool) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self.error(404, "RepoNotFound", "Repository not found")
        sha = repository.head(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", "Revision not found")
        content = repository.trees[sha].get(path)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        start = 0
        if send and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        broken = send and self.hub.breaks()
        self.send(206 if start else 200, content[start:], headers, send, broken=broken)

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def send(
        self, status: int, content: bytes, headers: dict[str, str], send: bool = True, broken: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = content[: len(content) // 2] if broken else content
        self.hub.log.append((self.command, unquote(self.path), len(sent) if send else 0))
        if send and self.command != "HEAD":
            self.wfile.write(sent)
        if broken:
            self.break_off()

    def break_off(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        """Say nothing on stderr."""


def _listed(tree: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files of a folder ("" for all there is), and where they are not all wanted its sub-folders."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: content for path, content in tree.items() if path.startswith(prefix)}
    files = [
        _entry(path, content) for path, content in inside.items() if recursive or "/" not in path.removeprefix(prefix)
    ]
    folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)}
    return files + [{"type": "directory", "path": path, "oid": _oid(b"")} for path in sorted(folders) if not recursive]


def _oid(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
