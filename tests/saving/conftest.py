import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The few routes of a model hub that a download asks for. A repository is a folder ``<root>/<owner>/<name>``."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and self.is_repository(parts[2:4]):
            is_tree = parts[4:5] == ["tree"]
            self.answer_json(self.tree(parts[2:4]) if is_tree else self.info(parts[2:4]))
        elif parts[2:3] == ["resolve"] and (file := self.root.joinpath(*parts[:2], *parts[4:])).is_file():
            body = file.read_bytes()
            self.answer(body, {"ETag": f'"{sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, status=404)

    do_HEAD = do_GET

    def is_repository(self, name: list[str]) -> bool:
        return len(name) == 2 and self.root.joinpath(*name).is_dir()

    def files(self, name: list[str]) -> dict[str, Path]:
        folder = self.root.joinpath(*name)
        return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}

    def info(self, name: list[str]) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.files(name)]
        return {"id": "/".join(name), "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def tree(self, name: list[str]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": sha1(file.read_bytes()).hexdigest()}
            for path, file in self.files(name).items()
        ]

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silent: the tests say what went wrong."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An empty hub on this machine: the folder that holds its repositories, and its address."""
    root = tmp_path / "hub"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHere", (Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., str]:
    """Run code in an interpreter that has imported nothing, with an empty hub cache; returns what it prints."""

    def run(code: str, endpoint: str | None = None) -> str:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
        if endpoint:
            environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
            del environment["HF_HUB_OFFLINE"]
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
