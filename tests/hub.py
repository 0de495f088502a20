"""A stand-in for the Hugging Face Hub on the loopback address: repositories, commits of small files, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Holds repositories in memory: ``files[repo][path]``. Every request is in ``requests``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, repo: str) -> str:
        """The hash of what the repository holds."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body, parts = self.body(), self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif parts[:2] == ["api", "models"] and "preupload" in parts:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif parts[:2] == ["api", "models"] and "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            revision = self.server.revision(repo)
            self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{revision}", "commitOid": revision})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.missing("NotImplemented")

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.files:
            repo = "/".join(parts[2:4])
            siblings = [{"rfilename": path} for path in self.server.files[repo]]
            self.answer(
                {"id": repo, "modelId": repo, "sha": self.server.revision(repo), "siblings": siblings, "tags": []}
            )
        elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) in self.server.files:
            repo, path = "/".join(parts[:2]), "/".join(parts[4:])
            data = self.server.files[repo].get(path)
            if data is None:
                self.missing("EntryNotFound")
            else:
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.revision(repo)}
                self.answer(data, **headers)
        else:
            self.missing("RepoNotFound")

    do_HEAD = do_GET
