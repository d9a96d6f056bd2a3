"""A server on this machine that speaks chat completions as it is told to, well or badly."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any


class Endpoint(BaseHTTPRequestHandler):
    """Chat completions, one prepared answer after the other; the last one for ever."""

    protocol_version = "HTTP/1.1"
    answers: list[Callable[[Any], None]]
    requests: list[dict[str, Any]]
    url: str

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, "headers": dict(self.headers), "body": self.body})
        (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(self)

    do_GET = do_POST

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silent."""


def says(content: Any, *, usage: Any = None, **choice: Any) -> Callable[[Endpoint], None]:
    choices = [{"index": 0, "message": {"role": "assistant", "content": content}, **choice}]
    completion = {"choices": choices, "usage": usage}
    return lambda handler: handler.send(json.dumps(completion).encode(), Content_Type="application/json")


def answers(status: int, content: bytes = b"", **headers: str) -> Callable[[Endpoint], None]:
    return lambda handler: handler.send(content, status, **headers)


def hangs_up(handler: Endpoint) -> None:
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler: Endpoint) -> None:
    handler.send(b'{"choices"', Content_Length="1000")
