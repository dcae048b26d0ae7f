"""A hub on this machine: the part of its API by which huggingface_hub fetches a model and uploads one.

It keeps what arrives. Errors have the header by which the library tells them apart.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """accounts: {token: the answer to whoami}. models: {id: {path: bytes}}. private: {id: bool}, of those made here.

    asked: "METHOD /path" of every request, in order. broken: paths that are answered with 500, by their beginnings.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.accounts, self.models, self.private, self.blobs = {}, {}, {}, {}
        self.asked, self.broken = [], ()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        hub, path = self.server, urlsplit(self.path).path
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        account = hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if hub.broken and path.startswith(hub.broken):
            return self.send(500, {"error": "the server is out of order"})
        if path == "/api/whoami-v2":
            return self.send(200, account) if account else self.send(401, {"error": "no such token"})
        if path.startswith("/blobs/"):
            hub.blobs[path.removeprefix("/blobs/")] = body
            return self.send(200, {})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != (account or {}).get("name"):
                return self.send(403, {"error": "not yours"})
            name = f"{asked['organization']}/{asked['name']}"
            hub.private[name] = asked["visibility"] == "private"
            hub.models[name] = {}
            return self.send(200, {"url": f"{hub.url}/{name}", "name": name})
        owner, name, *rest = path.removeprefix("/api/models").strip("/").replace(".git/", "/").split("/", 2)
        return self.of_model(f"{owner}/{name}", "".join(rest), body, account)

    def of_model(self, name, rest, body, account):
        hub = self.server
        if name not in hub.models:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = hub.models[name]
        if rest.startswith("resolve/"):
            return self.send_file(files.get(rest.split("/", 2)[2]))
        if rest in ("", "revision/main"):
            siblings = [{"rfilename": path} for path in files]
            return self.send(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        if rest.startswith("tree/"):
            return self.send(200, [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in files.items()])
        if name.split("/")[0] != (account or {}).get("name"):
            return self.send(403, {"error": "you may not write here"})
        if rest == "auth-check/write":
            return self.send(200, {})
        if rest == "preupload/main":
            modes = {
                f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in json.loads(body)["files"]
            }
            return self.send(
                200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if rest == "info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/blobs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if rest == "commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            return self.send(200, {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.send(404, {"error": f"{rest} is not spoken here"})

    def send_file(self, content):
        if content is None:
            return self.send(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            )
        etag = hashlib.sha1(content).hexdigest()
        return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
