"""A hub on localhost that takes one model; it answers only the requests that the hub library makes for an upload."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 30


class TakingHub(ThreadingHTTPServer):
    """Keeps the uploaded files; `private` is None until the repository is created."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: bool | None = None
        self.refuses = False
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        """The method and the path of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: TakingHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        self._answer(b"")

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("content-length") or 0)))

    def _answer(self, body: bytes):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if hub.refuses or self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._send({"error": "no"}, 403)
        elif path == "/api/repos/create":
            hub.private = json.loads(body)["visibility"] == "private" if hub.private is None else hub.private
            self._send({"url": f"{hub.url}/someone/model"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif path.startswith("/api/models/someone/model/preupload/"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif path.startswith("/api/models/someone/model/commit/"):
            self._keep([json.loads(line) for line in body.splitlines()])
        elif path.startswith("/api/models/someone/model") and hub.private is not None:
            self._send({"id": "someone/model", "private": hub.private, "sha": "a" * 40, "siblings": [], "tags": []})
        else:
            self._send({}, 404, {"X-Error-Code": "RepoNotFound"})

    def _keep(self, lines: list[dict[str, Any]]):
        for line in lines:
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.url}/someone/model/commit/{'a' * 40}"
        self._send({"commitUrl": url, "commitOid": "a" * 40, "success": True})

    def _send(self, tree: Any, status: int = 200, headers: dict[str, str] | None = None):
        body = json.dumps(tree).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
