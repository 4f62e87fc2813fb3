"""A Hub of data sets in memory, for tests without a network: what `create_repo`, uploads, downloads and listings ask for.

`serve()` starts it; its address goes into HF_ENDPOINT of another process, with HF_HUB_DISABLE_XET=1 and any HF_TOKEN.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(preupload|commit|revision|tree|paths-info|refs)(?:/(.*))?)?")
FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """`repositories`: id -> commits, the last one last, each (sha, {path: bytes}); `private`: id -> visibility."""

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.address = ""

    def files(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        commits = self.repositories[repo_id]
        return next((commit for commit in commits if commit[0] == revision), commits[-1])

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        before = self.repositories.setdefault(repo_id, [])
        sha = hashlib.sha1(repr((len(before), sorted(files.items()))).encode()).hexdigest()
        before.append((sha, files))
        return sha


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, headers=None, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def absent(self, what: str):
        self.answer({"error": what}, 404, {"X-Error-Code": what, "X-Error-Message": what})

    def content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if found := FILE.fullmatch(path):
            return self.file(*found.groups())
        found = API.fullmatch(path)
        if not found or found[1] not in self.hub.repositories:
            return self.absent("RepoNotFound")
        repo_id, what, rest = found.groups()
        revision, _, folder = (rest or "main").partition("/")
        sha, files = self.hub.files(repo_id, revision)
        if what == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
            return self.answer({"branches": [main], "tags": [], "converts": [], "pullRequests": []})
        if what == "tree":
            return self.tree(files, f"{folder.strip('/')}/" if folder.strip("/") else "")
        siblings = [{"rfilename": name, "size": len(one), "blobId": _oid(one)} for name, one in files.items()]
        info = {
            "_id": "0",
            "id": repo_id,
            "author": "user",
            "sha": sha,
            "private": self.hub.private.get(repo_id, False),
        }
        dates = dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        self.answer(
            {
                **info,
                **dates,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    do_HEAD = do_GET

    def tree(self, files: dict[str, bytes], prefix: str):
        inside = {name: one for name, one in files.items() if name.startswith(prefix)}
        if not inside and prefix:
            return self.absent("EntryNotFound")
        everything = "recursive=true" in self.path.lower()
        items = [
            {"type": "file", "path": name, "size": len(one), "oid": _oid(one)}
            for name, one in inside.items()
            if everything or "/" not in name[len(prefix) :]
        ]
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
        items += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self.answer(items)

    def file(self, repo_id: str, revision: str, name: str):
        if repo_id not in self.hub.repositories:
            return self.absent("RepoNotFound")
        sha, files = self.hub.files(repo_id, revision)
        if name not in files:
            return self.absent("EntryNotFound")
        content, headers = (
            files[name],
            {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{_oid(files[name])}"'},
        )
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(content[first : last + 1], 206, headers, "application/octet-stream")
        self.answer(content, 200, headers, "application/octet-stream")

    def do_PUT(self):
        self.hub.large[self.path.rsplit("/", 1)[1]] = self.content()
        self.answer({})

    def do_POST(self):
        path, content = unquote(urlsplit(self.path).path), self.content()
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repo_id in self.hub.repositories:
                return self.answer({"error": "exists", "url": f"{self.hub.address}/datasets/{repo_id}"}, 409)
            self.hub.commit(repo_id, {})
            self.hub.private[repo_id] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self.answer({"url": f"{self.hub.address}/datasets/{repo_id}", "id": repo_id})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **{key: one[key] for key in ("oid", "size")},
                    "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}", "header": {}}},
                }
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        found = API.fullmatch(path)
        if not found or found[1] not in self.hub.repositories:
            return self.absent("RepoNotFound")
        repo_id, what, revision = found.groups()
        sha, files = self.hub.files(repo_id, revision or "main")
        if what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".parquet") else "regular"}
                for one in json.loads(content)["files"]
            ]
            return self.answer(
                {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes], "commitOid": sha}
            )
        if what == "paths-info":
            names = json.loads(content)["paths"] if content.startswith(b"{") else []
            known = [
                {"type": "file", "path": n, "size": len(files[n]), "oid": _oid(files[n])} for n in names if n in files
            ]
            return self.answer(known)
        if what == "commit":
            changed = dict(files)
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changed[value["path"]] = self.hub.large[value["oid"]]
            sha = self.hub.commit(repo_id, changed)
            url = f"{self.hub.address}/datasets/{repo_id}/commit/{sha}"
            return self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        self.absent("RepoNotFound")


@contextmanager
def serve():
    """While it lasts, a hub answers at `hub.address`."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
