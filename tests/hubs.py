"""Two hubs on loopback, in memory, that speak the wire formats of Hugging Face and ModelScope to the hubs' real clients.

`faults(request)` may answer a request instead: with (status, body), with CUT (the connection is closed in the middle), or None.
"""

import base64
import hashlib
import json
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

CUT = object()
TOKEN = "hf_aSecretThatMustNeverBeSeen"


@dataclass
class Repo:
    private: bool
    files: dict[str, dict[str, bytes]]  # by revision and name
    lfs: set[str] = field(default_factory=set)  # names that a pointer stands for
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)  # revision, message, names


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: bytes
    headers: dict


class LoopbackHub:
    """What both have in common. requests: every one that came, (method, path); uploads: digests whose content was sent."""

    main = "main"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.faults = lambda request: None
        self.organisations = {"me"}
        self.lock = threading.Lock()
        self.url = ""
        # other origins that take content and are asked for it, where they are not the hub's own
        self.storage_url = self.verify_url = ""
        self.signature = ""  # what an upload's address ends with
        self.logins: list[str | None] = []  # of each request

    def answer(self, request: Request):
        """(status, body: bytes or something for JSON, headers)."""
        raise NotImplementedError

    def repo(self, name: str) -> Repo | None:
        return self.repos.get(name)

    def store(self, digest: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == digest, "content and its name differ"
        self.uploads.append(digest)
        self.blobs[digest] = content

    @contextmanager
    def running(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def handle_any(self):
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                request = Request(
                    self.command,
                    unquote(parts.path),
                    query,
                    body,
                    {key.lower(): value for key, value in self.headers.items()},
                )
                with hub.lock:
                    hub.requests.append((request.method, request.path))
                    hub.logins.append(request.headers.get("authorization"))
                    found = hub.faults(request)
                    if found is None:
                        authorised = (
                            TOKEN in request.headers.get("authorization", "") or "/lfs-storage/" in request.path
                        )
                        found = hub.answer(request) if authorised else hub.refuse_token()
                if found is CUT:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    self.wfile.flush()
                    self.close_connection = True
                    return
                status, content, *more = found
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
                for key, value in (headers | (more[0] if more else {})).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def refuse_token(self):
        raise NotImplementedError


class HuggingFaceHub(LoopbackHub):
    """model repositories: info, create, branch, tree (in pages), preupload, git LFS (one part or several), commit, resolve."""

    page = 400
    part = 3 << 20  # content above it is sent in parts of it

    def __init__(self):
        super().__init__()
        self.parts: dict[tuple[str, int], bytes] = {}

    def refuse_token(self):
        return 401, {"error": "Invalid credentials in Authorization header"}

    def answer(self, request: Request):
        path = request.path
        if path == "/api/repos/create":
            return self.create(json.loads(request.body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs-storage/"):
            return self.storage(request, *path.split("/")[2:])
        if path.startswith("/verify/"):
            asked = json.loads(request.body)
            return (200, {}) if asked["oid"] in self.blobs else (404, {"error": "not stored"})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(path[1:].partition(".git/")[0], json.loads(request.body))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, what = "/".join(parts[2:4]), parts[4:]
            repo = self.repo(name)
            if repo is None:
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return self.of_repo(request, name, repo, what)
        if len(parts) > 4 and parts[2] == "resolve":
            repo = self.repo("/".join(parts[:2]))
            content = repo.files.get(parts[3], {}).get("/".join(parts[4:])) if repo else None
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            return 200, content, {"Content-Type": "application/octet-stream"}
        return 404, {"error": f"no such page {path}"}

    def create(self, asked: dict):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.organisations:
            return 403, {
                "error": f"You don't have the rights to create a model under the namespace {asked['organization']!r}"
            }
        if name in self.repos:
            return 409, {"error": "You already created this model repo"}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(private, {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}})
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def of_repo(self, request: Request, name: str, repo: Repo, what: list[str]):
        if not what or what[0] == "revision":
            return 200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": [], "tags": []}
        revision = unquote("/".join(what[1:]))
        if what[0] == "branch":
            if revision in repo.files:
                return 409, {"error": "Reference already exists"}
            repo.files[revision] = dict(repo.files["main"])
            return 200, {}
        if revision not in repo.files:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.files[revision]
        if what[0] == "tree":
            return self.tree(request, repo, files)
        if what[0] == "preupload":
            asked = json.loads(request.body)["files"]
            return 200, {"files": [self.mode(file, files) for file in asked]}
        if what[0] == "commit":
            return self.commit(name, repo, revision, request.body)
        return 404, {"error": f"no {what[0]} here"}

    def mode(self, file: dict, files: dict) -> dict:
        is_lfs = file["path"].endswith((".safetensors", ".bin")) or file["size"] > 10 << 20
        return {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": None}

    def tree(self, request: Request, repo: Repo, files: dict):
        first = int(request.query.get("cursor", 0))
        entries = []
        for path in sorted(files)[first : first + self.page]:
            content = files[path]
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if path in repo.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        more = {}
        if first + self.page < len(files):
            more["Link"] = f'<{self.url}{request.path}?recursive=True&cursor={first + self.page}>; rel="next"'
        return 200, entries, more

    def batch(self, name: str, asked: dict):
        objects = []
        for wanted in asked["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.blobs:
                header = {}
                if wanted["size"] > self.part:
                    count = -(-wanted["size"] // self.part)
                    where = f"{self.storage_url or self.url}/lfs-storage/{wanted['oid']}"
                    header = {"chunk_size": str(self.part)} | {f"{n + 1:05d}": f"{where}/{n}" for n in range(count)}
                upload = {
                    "href": f"{self.storage_url or self.url}/lfs-storage/{wanted['oid']}{self.signature}",
                    "header": header,
                }
                found["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.verify_url or self.url}/verify/{wanted['oid']}"},
                }
            objects.append(found)
        return 200, {"transfer": "multipart" if any("actions" in o for o in objects) else "basic", "objects": objects}

    def storage(self, request: Request, digest: str, number: str | None = None):
        if request.method == "POST":  # all parts have come
            count = len(json.loads(request.body)["parts"])
            self.store(digest, b"".join(self.parts.pop((digest, n)) for n in range(count)))
        elif number is not None:
            self.parts[digest, int(number)] = request.body
        else:
            self.store(digest, request.body)
        return 200, {}, {"ETag": f'"{uuid.uuid4().hex}"'}

    def commit(self, name: str, repo: Repo, revision: str, body: bytes):
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        names = []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                if value["path"] not in repo.files[revision]:
                    return 400, {"error": f"{value['path']} is not there and cannot be removed"}
                del repo.files[revision][value["path"]]
                continue
            names.append(value["path"])
            if line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": f"{value['path']} points to content that never came"}
                repo.files[revision][value["path"]] = self.blobs[value["oid"]]
                repo.lfs.add(value["path"])
            else:
                assert line["key"] == "file" and value["encoding"] == "base64"
                repo.files[revision][value["path"]] = base64.b64decode(value["content"])
        repo.commits.append((revision, lines[0]["value"]["summary"], names))
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}


class ModelScopeHub(LoopbackHub):
    """models: info, create, files, LFS batch, blobs, commit, raw files; datasets: tree and raw files."""

    main = "master"

    def __init__(self):
        super().__init__()
        self.datasets: dict[str, dict[str, bytes]] = {}

    def refuse_token(self):
        return 401, {"Code": 10010205002, "Message": "the access token is invalid", "Success": False}

    def answer(self, request: Request):
        parts = request.path.strip("/").split("/")
        if parts[0] == "lfs-storage":
            self.store(parts[1], request.body)
            return 200, {"Code": 200}
        if parts[:3] == ["openapi", "v1", "models"]:
            repo = self.repo("/".join(parts[3:5]))
            if repo is None:
                return 404, {"success": False, "code": "NOT_FOUND", "message": "no such model"}
            owner, name = parts[3:5]
            return 200, {"success": True, "data": {"id": f"{owner}/{name}", "private": repo.private}}
        if request.path == "/api/v1/models" and request.method == "POST":
            return self.create(json.loads(request.body))
        if parts[:4] == ["api", "v1", "repos", "models"]:
            return self.write(request, "/".join(parts[4:6]), parts[6:])
        if parts[:3] == ["api", "v1", "models"]:
            return self.read(request, "/".join(parts[3:5]), parts[5:])
        if parts[:3] == ["api", "v1", "datasets"]:
            return self.of_dataset(request, "/".join(parts[3:5]), parts[5:])
        return 404, {"Code": 404, "Message": f"no such page {request.path}", "Success": False}

    def create(self, asked: dict):
        name = f"{asked['Path']}/{asked['Name']}"
        if asked["Path"] not in self.organisations:
            return 403, {"Code": 403, "Message": f"no right to create under {asked['Path']}", "Success": False}
        if name in self.repos:
            return 400, {"Code": 10020101001, "Message": "the repository already exists", "Success": False}
        self.repos[name] = Repo(asked["Visibility"] == 1, {})
        return 200, {"Code": 200, "Data": {"Path": asked["Path"], "Name": asked["Name"]}, "Success": True}

    def write(self, request: Request, name: str, what: list[str]):
        repo = self.repo(name)
        if repo is None:
            return 404, {"Code": 404, "Message": "no such model", "Success": False}
        asked = json.loads(request.body)
        if what[0] == "info":
            wanted = [o for o in asked["objects"] if o["oid"] not in self.blobs]
            objects = [
                {
                    **o,
                    "actions": {
                        "upload": {"href": f"{self.storage_url or self.url}/lfs-storage/{o['oid']}{self.signature}"}
                    },
                }
                for o in wanted
            ]
            return 200, {"Code": 200, "Data": {"objects": objects}, "Success": True}
        files = repo.files.setdefault(unquote(what[1]), {})
        for action in asked["actions"]:
            if action["action"] == "delete":
                if files.pop(action["path"], None) is None:
                    return 400, {"Code": 400, "Message": f"{action['path']} is not there", "Success": False}
                continue
            assert action["action"] == "create"
            if action["type"] == "lfs":
                if action["sha256"] not in self.blobs:
                    return 400, {"Code": 400, "Message": f"{action['path']} was never sent", "Success": False}
                files[action["path"]] = self.blobs[action["sha256"]]
                repo.lfs.add(action["path"])
            else:
                files[action["path"]] = base64.b64decode(action["content"])
        repo.commits.append((what[1], asked["commit_message"], [action["path"] for action in asked["actions"]]))
        return 200, {"Code": 200, "Data": {"CommitId": hashlib.sha1(request.body).hexdigest()}, "Success": True}

    def read(self, request: Request, name: str, what: list[str]):
        repo = self.repo(name)
        if repo is None:
            return 404, {"Code": 404, "Message": "no such model", "Success": False}
        if not what:
            return 200, {"Code": 200, "Data": {"Visibility": 1 if repo.private else 5}, "Success": True}
        files = repo.files.get(request.query["Revision"])
        if files is None:
            return 404, {"Code": 404, "Message": "no such revision", "Success": False}
        return self.listed(files) if what == ["repo", "files"] else self.raw(files, request)

    def of_dataset(self, request: Request, name: str, what: list[str]):
        files = self.datasets.get(name)
        if files is None:
            return 404, {"Code": 404, "Message": "no such data set", "Success": False}
        if not what:
            return 200, {"Code": 200, "Data": {"Id": 1, "Name": name, "Type": 4}, "Success": True}
        return self.listed(files) if what == ["repo", "tree"] else self.raw(files, request)

    def listed(self, files: dict[str, bytes]):
        entries = [
            {
                "Path": path,
                "Name": path,
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
                "Type": "blob",
            }
            for path, content in sorted(files.items())
        ]
        return 200, {"Code": 200, "Data": {"Files": entries}, "Success": True}

    def raw(self, files: dict[str, bytes], request: Request):
        content = files.get(request.query["FilePath"])
        if content is None:
            return 404, {"Code": 404, "Message": "no such file", "Success": False}
        return 200, content, {"Content-Type": "application/octet-stream"}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
