"""Captions from any server with a vision model that speaks OpenAI's chat completions, within limits of rate and cost.

::

    caption = EndpointCaptioner(
        base_url="https://api.openai.com/v1", model="gpt-4.1", api_key_variable="OPENAI_API_KEY",
        requests_per_minute=500, price_per_million_input=2.0, price_per_million_output=8.0, max_cost=50.0,
    )
    results = caption([CaptionRequest(key="0", picture=Path("0.jpg").read_bytes(), metadata={})])
"""

import base64
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

from PIL import Image

from wellposed.data.decoding import read_header
from wellposed.lens.caption_writer import CaptionWriter, decode_for_captioner, read_caption
from wellposed.lens.captioning import CaptionRequest, CaptionResult
from wellposed.lens.chat_endpoint import RETRIED_STATUS, ChatAnswer, ChatEndpoint, EndpointError
from wellposed.lens.rate_limit import RateLimit

__all__ = ["EndpointCaptioner"]

# A redirection, a wrong key, no credit, no permission, no such address or model: the next picture will fare no better.
HOPELESS_STATUS = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404})
# Such words in parameters limit an answer and change none that is whole.
LIMITS = frozenset({"max_tokens", "max_completion_tokens"})
SENT_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
JPEG_QUALITY = 92
JITTER = 0.5
NONSENSE_RETRIES = 1
# A call ends with its slowest answers, when few requests are under way: they are to be a small part of it.
ROUNDS = 4
# What a picture takes at usual sizes and models: a guess, until the answer says what it was.
PICTURE_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class EndpointCaptioner(CaptionWriter):
    """Asks a server, several pictures at a time.

    A call gives one result for each request, in their order. What may pass is asked again with growing pauses, see
    :class:`~wellposed.lens.chat_endpoint.ChatEndpoint`; an answer that is no caption is asked for once more and is then
    the picture's error. Pictures are shown upright, on white; those that are JPEG, PNG or WebP and small enough are
    sent as they are, others as JPEG.

    Limits of rate and cost hold for all calls of one captioner in one process. A copy in another process (pickled, as
    Ray does) counts anew, so a limit is to be divided among workers; so does the next run of a program.

    Reasons of errors: ``no picture``, ``no answer``, ``turned down`` (such as by HTTP 400), ``nonsense`` (not a chat
    completion), ``empty``, ``no letters``, ``refused``, ``cut off``, ``too long``, ``repeats the instructions``, ``not
    sent``.

    Attributes:
        base_url: up to ``/v1``.
        model: its name there.
        api_key: sent as a bearer token; None for a server that wants none.
        api_key_variable: name of an environment variable with the key, read when a call begins; the better choice
            where captioners are pickled.
        temperature: of the sampling; None leaves it to the server.
        seed: of the sampling, one more when an answer is asked for again; None leaves it to the server.
        max_tokens: of an answer; None leaves it to the server. An answer that reaches it is cut off and no caption.
        parameters: further fields of the request; OpenAI's reasoning models take ``{"max_completion_tokens": 4096}``,
            no temperature and no max_tokens.
        timeout: seconds for one request.
        retries: how often to ask again for what may pass.
        max_wait: seconds between two attempts at most.
        patience: when so many pictures in a row got no answer, in spite of all retries, the call ends as with a wrong
            key.
        requests_per_minute: that begin, those asked again among them; None for no limit.
        tokens_per_minute: read and written; until an answer says how many they were, by a guess.
        concurrency: how many requests are under way at a time.
        price_per_million_input: of a million tokens read, in any currency.
        price_per_million_output: of a million tokens written.
        max_cost: when so much is spent, nothing more is sent: what is left has an error ``not sent``. Requests under
            way are not called back, so it may be overstepped by the cost of ``concurrency`` of them.
        clock: seconds that only grow.
        sleep: waits for a number of seconds.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    api_key_variable: str | None = None
    temperature: float | None = 0.2
    seed: int | None = None
    max_tokens: int | None = 2048
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 5
    max_wait: float = 60.0
    patience: int = 20
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int = 8
    price_per_million_input: float = 0.0
    price_per_million_output: float = 0.0
    max_cost: float | None = None
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: see :class:`CaptionWriter`, :class:`~wellposed.lens.chat_endpoint.ChatEndpoint` and
                :class:`~wellposed.lens.rate_limit.RateLimit`; two keys; prices or a concurrency out of range; a limit
                of cost without prices.
        """
        super().__post_init__()
        self._endpoint(self.api_key)
        _ = self._budget
        if self.api_key is not None and self.api_key_variable is not None:
            raise ValueError("got both a key and the name of a variable with a key; give one of them")
        if self.concurrency < 1 or self.patience < 1:
            raise ValueError(f"concurrency is {self.concurrency} and patience {self.patience}; give at least 1")
        if min(self.price_per_million_input, self.price_per_million_output) < 0:
            raise ValueError(
                f"prices are {self.price_per_million_input} and {self.price_per_million_output}; give at least 0"
            )
        if self.max_cost is not None and not self.price_per_million_input + self.price_per_million_output > 0:
            raise ValueError(
                f"max_cost is {self.max_cost} and everything is free; give price_per_million_input and _output"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What captions depend on, for whoever keeps them; not where the model is and what it may cost."""
        kept = {name: value for name, value in self.parameters.items() if name not in LIMITS}
        asked = {"model": self.model, "temperature": self.temperature, "seed": self.seed, "parameters": kept}
        return super().identity | asked

    @property
    def at_a_time(self) -> int:
        """How many requests a call should have, at least, so that ``concurrency`` of them are mostly under way."""
        return ROUNDS * self.concurrency

    def __call__(self, requests: Sequence[CaptionRequest]) -> list[CaptionResult]:
        """A result for each request; see :meth:`ask`."""
        return self.ask(requests, lambda result: None)

    def ask(
        self, requests: Sequence[CaptionRequest], on_result: Callable[[CaptionResult], None]
    ) -> list[CaptionResult]:
        """A result for each request, told when it is there, also while the call is interrupted.

        If nothing can go on, such as with a wrong key or a server that is gone, and there are captions from earlier in
        the call, those are returned and the rest is ``not sent``; the next call raises.

        Raises:
            EndpointError: nothing can go on, and no caption was got; an OSError.
            ValueError: the variable with the key is not set.
        """
        call = _Call(captioner=self, endpoint=self._endpoint(self._key()), budget=self._budget)

        def answer(request: CaptionRequest) -> CaptionResult:
            result = call.result(request)
            # In the thread that asked: when this call is interrupted, those under way still come to their end.
            on_result(result)
            return result

        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(answer, requests))
        if call.ends and not any(result.text for result in results):
            raise EndpointError(f"{call.ends[0]}; check base_url, model and key", call.ends[0].status)
        return results

    def __getstate__(self) -> dict[str, Any]:
        """Without what is counted: it holds locks, and another process counts for itself."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _key(self) -> str | None:
        if self.api_key_variable is None:
            return self.api_key
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise ValueError(f"the environment has no {self.api_key_variable}; set it to the key, or give api_key")
        return key

    def _endpoint(self, key: str | None) -> ChatEndpoint:
        return ChatEndpoint(
            base_url=self.base_url,
            model=self.model,
            api_key=key,
            timeout=self.timeout,
            retries=self.retries,
            max_wait=self.max_wait,
            jitter=JITTER,
            sleep=self.sleep,
        )

    @cached_property
    def _budget(self) -> "_Budget":
        return _Budget(self)


class _NotSentError(Exception):
    """Nothing more is sent."""


class _Budget:
    """What may be sent and what is spent, by all threads and calls of a captioner."""

    def __init__(self, captioner: EndpointCaptioner) -> None:
        limit = partial(RateLimit, clock=captioner.clock, sleep=captioner.sleep)
        self._requests, self._tokens = limit(captioner.requests_per_minute), limit(captioner.tokens_per_minute)
        # English has some four letters to a token and three words to four tokens.
        self._guess = PICTURE_TOKENS + len(captioner.instructions) / 4 + 4 * captioner.max_words / 3
        self._prices = captioner.price_per_million_input / 1e6, captioner.price_per_million_output / 1e6
        self._max_cost = captioner.max_cost
        self._lock = threading.Lock()
        self._spent, self._blind, self._unanswered = 0.0, False, 0

    def cost(self, usage: tuple[int, int] | None) -> float:
        """Of tokens read and written."""
        read, written = usage or (0, 0)
        return read * self._prices[0] + written * self._prices[1]

    def wait(self) -> None:
        """For one's turn under both limits of rate."""
        self._requests.take()
        self._tokens.take(self._guess)

    def spend(self, usage: tuple[int, int] | None) -> None:
        """Count what an answer used."""
        if usage is not None:
            self._tokens.correct(sum(usage) - self._guess)
        with self._lock:
            self._spent += self.cost(usage)
            self._blind |= usage is None
            self._unanswered = 0

    def miss(self) -> int:
        """Count a picture without an answer; how many there are in a row."""
        with self._lock:
            self._unanswered += 1
            return self._unanswered

    def check(self) -> None:
        """Raise if nothing more may be spent."""
        if self._max_cost is None:
            return
        if self._spent >= self._max_cost:
            raise _NotSentError(f"{self._spent:.6g} of max_cost {self._max_cost:g} is spent")
        if self._blind:
            raise _NotSentError("the server does not say how many tokens it used, so max_cost cannot be kept")


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a captioner; ``ends`` are the errors after which it cannot go on."""

    captioner: EndpointCaptioner
    endpoint: ChatEndpoint
    budget: _Budget
    ends: list[EndpointError] = field(default_factory=list)

    def result(self, request: CaptionRequest) -> CaptionResult:
        begin = self.captioner.clock()
        answers: list[ChatAnswer] = []
        text = error = None
        try:
            text = self._caption(request, answers)
        except _NotSentError as failure:
            error = f"not sent: {failure}"
        except EndpointError as failure:
            hopeless = failure.status in HOPELESS_STATUS
            if self.budget.miss() >= self.captioner.patience or hopeless:
                self.ends.append(failure)
            passing = failure.status is None or failure.status in RETRIED_STATUS or failure.status >= 500
            error = f"{'not sent' if hopeless else 'no answer' if passing else 'turned down'}: {failure}"
        except ValueError as failure:
            error = str(failure)
        return CaptionResult(
            key=request.key,
            text=text,
            error=error,
            seconds=self.captioner.clock() - begin,
            prompt_tokens=sum(answer.usage[0] for answer in answers if answer.usage),
            completion_tokens=sum(answer.usage[1] for answer in answers if answer.usage),
            cost=sum((self.budget.cost(answer.usage) for answer in answers), 0.0),
        )

    def _caption(self, request: CaptionRequest, answers: list[ChatAnswer]) -> str:
        """A caption; all answers on the way to it are appended to ``answers``."""
        prompt = self.captioner.prompt(request.key)
        shown = {"type": "image_url", "image_url": {"url": _data_url(request.picture, self.captioner.image_side)}}
        # No system message: the templates of many vision models have no place for one.
        message = {"role": "user", "content": [{"type": "text", "text": prompt}, shown]}
        for attempt in itertools.count():
            try:
                answers.append(self._ask(message, attempt))
                return _read(answers[-1], prompt, self.captioner.max_words)
            except ValueError:
                if attempt == NONSENSE_RETRIES:
                    raise
        raise AssertionError("counting ends")

    def _ask(self, message: Mapping[str, Any], attempt: int) -> ChatAnswer:
        captioner = self.captioner
        named = {
            "temperature": captioner.temperature,
            "seed": None if captioner.seed is None else captioner.seed + attempt,
            "max_tokens": captioner.max_tokens,
        }
        parameters = {name: value for name, value in named.items() if value is not None}
        try:
            answer = self.endpoint.complete(
                [message], {**parameters, **captioner.parameters}, before_each=self._wait_for_turn
            )
        except ValueError as error:
            raise ValueError(f"nonsense: {error}") from error
        self.budget.spend(answer.usage)
        return answer

    def _wait_for_turn(self) -> None:
        # Before too: what will not be sent must not take a turn.
        self._check()
        self.budget.wait()
        self._check()

    def _check(self) -> None:
        if self.ends:
            raise _NotSentError(str(self.ends[0]))
        self.budget.check()


def _read(answer: ChatAnswer, prompt: str, max_words: int) -> str:
    if answer.finish_reason == "content_filter":
        raise ValueError("refused: a filter of the server's held the answer back")
    if answer.finish_reason == "length":
        raise ValueError(f"cut off: the answer reached its limit of tokens: {answer.content[:200]!r}")
    return read_caption(answer.content, prompt=prompt, max_words=max_words)


def _data_url(encoded: bytes, side: int) -> str:
    """A picture as it is sent; raises ValueError for what is none."""
    kind, sent = "JPEG", encoded
    picture = decode_for_captioner(encoded, side)
    with Image.open(io.BytesIO(encoded)) as original:
        plain = original.mode in ("RGB", "L", "P") and not original.has_transparency_data
        upright = read_header(encoded).orientation == 1
        still = getattr(original, "n_frames", 1) == 1
        if original.format in SENT_FORMATS and plain and upright and still and original.size == picture.size:
            kind = original.format
        else:
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=JPEG_QUALITY)
            sent = file.getvalue()
    return f"data:{SENT_FORMATS[kind]};base64,{base64.b64encode(sent).decode()}"
