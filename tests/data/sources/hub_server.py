"""A hub on localhost with one data set, for streaming by `datasets`; it closes connections in the middle of a shard."""

import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

ID, COMMIT = "someone/text", "a" * 40


class FlakyHub(ThreadingHTTPServer):
    """Serves `files` (path to bytes); `breaks` lists for each file the bytes at which connections are closed."""

    def __init__(self, files: dict[str, bytes], breaks: dict[str, list[int]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.breaks = files, breaks
        self.served: list[tuple[str, int, bool]] = []
        """Each request: path, first byte, and whether the connection was closed early."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self._answer()

    def _answer(self):
        path = unquote(self.path.partition("?")[0])
        files = [{"type": "file", "path": p, "size": len(b), "oid": COMMIT} for p, b in self.server.files.items()]
        if path.startswith(f"/api/datasets/{ID}/tree/{COMMIT}/"):
            self._send(json.dumps(files).encode())
        elif path.startswith(f"/api/datasets/{ID}/tree/"):
            self._send(json.dumps([{"type": "directory", "path": "data", "oid": COMMIT}]).encode())
        elif path.startswith(f"/api/datasets/{ID}"):
            names = [{"rfilename": name} for name in self.server.files]
            self._send(json.dumps({"id": ID, "sha": COMMIT, "siblings": names, "tags": []}).encode())
        elif (match := re.match(rf"/datasets/{ID}/resolve/[^/]+/(.*)", path)) and match[1] in self.server.files:
            self._send_range(match[1])
        else:
            self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None):
        self.send_response(status)
        for key, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_range(self, name: str):
        body = self.server.files[name]
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        assert wanted is not None
        first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
        breaks = self.server.breaks.get(name, [])
        broken = bool(breaks) and breaks[0] <= first and self.command != "HEAD"
        if broken:
            breaks.pop(0)
        self.server.served.append((name, first, broken))
        span = {"Content-Range": f"bytes {first}-{last}/{len(body)}", "ETag": '"x"', "Accept-Ranges": "bytes"}
        self._send(body[first : last + 1], 206, span, cut=(last - first) // 2 if broken else None)
