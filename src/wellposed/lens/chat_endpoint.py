"""A server that speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama, OpenAI itself), asked with patience.

:meth:`ChatEndpoint.complete` sends messages and reads the answer. What may pass, which is silence, a broken connection,
too many requests or an overloaded server, is asked again; what will not pass is an :class:`EndpointError` at once.
Nothing that a server sends is trusted: not its size, not its speed, not its form, and it is not followed elsewhere. The
key is in no error and in no log, even if the server repeats it.
"""

import email.utils
import itertools
import json
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException
from typing import Any

__all__ = ["RETRIED_STATUS", "ChatAnswer", "ChatEndpoint", "EndpointError"]

logger = logging.getLogger(__name__)

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_ANSWER_BYTES = 4 << 20
CHUNK_BYTES = 1 << 16


class EndpointError(OSError):
    """A server that does not answer, or with an error.

    Attributes:
        status: the HTTP status of its last answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """What the assistant says.

    Attributes:
        content: its words; empty if it says nothing.
        finish_reason: why it ended, as the server puts it: ``"stop"``, ``"length"``, ``"content_filter"`` or another.
        usage: tokens read and written; None if the server does not say.
    """

    content: str
    finish_reason: str | None
    usage: tuple[int, int] | None

    def whole(self) -> str:
        """The words, if they are all there.

        Raises:
            ValueError: the answer was cut off.
        """
        if self.finish_reason == "length":
            raise ValueError("the answer was cut off at its limit of tokens; raise max_tokens in parameters")
        return self.content


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Asks a server that speaks OpenAI's chat completions.

    Attributes:
        base_url: up to ``/v1``.
        model: its name there.
        api_key: sent as a bearer token; None for a server that wants none.
        timeout: seconds for one request, from its beginning to the end of its answer.
        retries: how often to ask again after a timeout, a broken connection, or an answer 408, 409, 425, 429 or 5xx.
            The pause before is what the server's Retry-After asks for, or else 1, 2, 4, ... seconds.
        max_wait: seconds between two requests at most, whatever Retry-After says.
        jitter: pauses are stretched by a random factor in [1, 1 + jitter], so that those who were sent away together
            do not come back together.
        sleep: waits for a number of seconds.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 2
    max_wait: float = 30.0
    jitter: float = 0.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: an address that is none, no model, a key that fits into no header, numbers out of range.
        """
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {self.base_url!r}; write it with http:// or https://, up to /v1")
        if not self.model or self.timeout <= 0 or min(self.retries, self.max_wait, self.jitter) < 0:
            raise ValueError(
                f"got model {self.model!r}, timeout {self.timeout}, retries {self.retries}, max_wait {self.max_wait}, "
                f"jitter {self.jitter}; give a name, a positive timeout, and at least 0 of the others"
            )
        # http.client would refuse it too, with the key in its message.
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            raise ValueError("the key has blanks, line ends or signs beyond ASCII; give it as the server issued it")

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Any] = {},
        *,
        before_each: Callable[[], None] | None = None,
    ) -> ChatAnswer:
        """The answer to messages.

        Args:
            messages: as the protocol has them.
            parameters: further fields of the request.
            before_each: called before each attempt, such as to wait for one's turn.

        Raises:
            EndpointError: the server does not answer, or with an error; an OSError.
            ValueError: its answer is none of a chat completion, or too large.
        """
        request = self._request({"model": self.model, "messages": list(messages), **parameters})
        for attempt in itertools.count():
            if before_each is not None:
                before_each()
            wait = None
            try:
                return self._read(self._exchange(request))
            except urllib.error.HTTPError as error:
                wait = _retry_after(error.headers)
                with error:
                    reason = self._hide_key(f"{error.code} {error.reason}: {_beginning(error)}")
                if error.code not in RETRIED_STATUS or attempt == self.retries:
                    raise EndpointError(f"{self.base_url} answered {reason}", error.code) from None
            except (OSError, HTTPException) as error:
                reason = self._hide_key(str(error))
                if attempt == self.retries:
                    raise EndpointError(f"{self.base_url} did not answer: {reason}") from None
            pause = 2.0**attempt if wait is None else wait
            pause = min(self.max_wait, pause * (1 + self.jitter * random.random()))
            logger.info("%s: %s; asking again in %.1f s", self.base_url, reason, pause)
            self.sleep(pause)
        raise AssertionError("counting ends")

    def _request(self, body: Mapping[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions", data=json.dumps(body).encode(), headers=headers
        )

    def _exchange(self, request: urllib.request.Request) -> bytes:
        # The timeout of a socket is for each of its reads; a server that sends a byte now and then would never end.
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
            while chunk := response.read1(CHUNK_BYTES):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise ValueError(f"{self.base_url} answered with more than {MAX_ANSWER_BYTES >> 20} MB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete answer within {self.timeout:g} s")
            if response.length:
                raise ConnectionError(f"the answer broke off {response.length} bytes before its end")
        return bytes(content)

    def _read(self, body: bytes) -> ChatAnswer:
        try:
            completion = json.loads(body)
            choice = completion["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"the answer is no chat completion: {self._hide_key(repr(body[:200]))}") from None
        if content is not None and not isinstance(content, str):
            raise ValueError(f"the answer's content is {type(content).__name__}, expected text")
        finish = choice.get("finish_reason")
        return ChatAnswer(
            content=self._hide_key(content or ""),
            finish_reason=finish if isinstance(finish, str) else None,
            usage=_usage(completion),
        )

    def _hide_key(self, text: str) -> str:
        return text.replace(self.api_key, "[key]") if self.api_key else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key along to wherever it is sent."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def _beginning(error: urllib.error.HTTPError) -> str:
    """What an error says, as far as it can be read."""
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, HTTPException):
        return ""


def _usage(completion: Mapping[str, Any]) -> tuple[int, int] | None:
    """Tokens read and written."""
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0):
        return None
    return read, written


def _retry_after(headers: Message) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
