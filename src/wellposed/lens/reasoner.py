"""Optional: a language model that writes a prompt out before it is encoded.

Lens was trained on long descriptions, and its published scores use a rewriter: without one GenEval is 0.843, with
gpt-oss-20b 0.874, with GPT-5.5, which was shown the benchmark's metadata, 0.930 (arXiv 2605.21573). A rewriter changes
what is being measured: scores with one do not compare with scores without.

A *reasoner* is any function from a prompt to a raw answer. Two are here: :class:`EndpointReasoner` asks a server that
speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama, OpenAI itself), :class:`LocalReasoner` the model that encodes
the text anyway, or another one with a chat template. :func:`enhance_prompts` applies one and never loses a prompt:
whatever goes wrong, the original goes on, and the log says why.

The instructions are written anew after the paper's description of what they ask for. Its few-shot examples, and the
variants tuned to single benchmarks, are not here.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from wellposed.lens.chat_endpoint import ChatEndpoint
from wellposed.lens.raw_answers import read_answer

__all__ = ["REASONER_INSTRUCTIONS", "EndpointReasoner", "LocalReasoner", "enhance_prompts"]

logger = logging.getLogger(__name__)

REASONER_INSTRUCTIONS = """\
You write descriptions for a model that paints exactly what it reads and nothing else. You are given a user's request \
for a picture. Answer with the description of that one picture, as plain prose in a single paragraph.

Keep to the request. Whatever it states stays as stated: which things there are and how many, what they look like, \
what they do, where they are relative to each other, and any wording to appear in the picture, letter for letter. You \
may add what makes the scene concrete, such as light, material, viewpoint and surroundings, as long as it agrees with \
the request and brings in no new main subject.

Describe the whole scene that the request implies. Where there are several subjects of one kind, go through them one \
by one, with the look, the pose and the place of each, so that none can be confused with another and their number can \
be counted. If the request is already this complete, return it with the smallest changes that make it read well.

Where the request leaves a plain conclusion to the reader, draw it and describe what is then seen: if a sum is written \
on a wall, give its result. Draw no conclusion that several answers would fit.

State facts. Nothing is likely, optional or one of two. Do not address the user, do not ask, do not explain, and use \
no headings, lists or markup.

Write in the language of the request."""


def enhance_prompts(prompts: Sequence[str], reasoner: Callable[[str], str] | None) -> list[str]:
    """Prompts as a reasoner rewrites them; those on which it fails as they are.

    Failures are anything that it raises and answers in which nothing is left once :func:`read_answer` has cleaned them;
    each is a warning in the log. Blank prompts are not sent.

    Args:
        prompts: one or more.
        reasoner: from a prompt to a raw answer. None: prompts are returned unchanged.
    """
    if reasoner is None:
        return list(prompts)
    return [_enhanced(prompt, reasoner) for prompt in prompts]


def _enhanced(prompt: str, reasoner: Callable[[str], str]) -> str:
    if not prompt.strip():
        return prompt
    try:
        answer = read_answer(reasoner(prompt))
    except Exception as error:  # whatever it is, the user's prompt is worth more
        logger.warning("prompt %r goes on as it is: the reasoner failed (%s: %s)", prompt, type(error).__name__, error)
        return prompt
    if not answer:
        logger.warning("prompt %r goes on as it is: the reasoner's answer holds no description", prompt)
        return prompt
    return answer


@dataclass(frozen=True, kw_only=True)
class EndpointReasoner:
    """Asks a server that speaks OpenAI's chat completions.

    ::

        ask = EndpointReasoner(base_url="http://127.0.0.1:8000/v1", model="openai/gpt-oss-20b")
        prompts = enhance_prompts(["four dogs"], ask)

    Attributes:
        base_url: up to ``/v1``.
        model: its name there.
        api_key: sent as a bearer token; None for a server that wants none.
        instructions: the system message.
        parameters: further fields of the request. Some models want other names: OpenAI's reasoning models take
            ``{"max_completion_tokens": 4096}`` and no temperature.
        timeout: seconds for one request, from its beginning to the end of its answer.
        retries: how often to ask again after a timeout, a broken connection, or an answer 408, 409, 425, 429 or 5xx.
        max_wait: seconds between two requests at most, whatever the server's Retry-After asks for.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    instructions: str = REASONER_INSTRUCTIONS
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.7, "max_tokens": 4096})
    timeout: float = 60.0
    retries: int = 2
    max_wait: float = 30.0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: see :class:`ChatEndpoint`.
        """
        self._endpoint()

    def __call__(self, prompt: str) -> str:
        """The raw answer to a prompt.

        Raises:
            OSError: the server does not answer, or with an error.
            ValueError: its answer is none of a chat completion, or was cut off.
        """
        messages = [{"role": "system", "content": self.instructions}, {"role": "user", "content": prompt}]
        return self._endpoint().complete(messages, self.parameters).whole()

    def _endpoint(self) -> ChatEndpoint:
        return ChatEndpoint(
            base_url=self.base_url,
            model=self.model,
            api_key=self.api_key,
            timeout=self.timeout,
            retries=self.retries,
            max_wait=self.max_wait,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalReasoner:
    """Asks a language model in memory through its chat template: the GPT-OSS that encodes the text, or another one.

    Attributes:
        model: with its head.
        tokenizer: with a chat template.
        instructions: the system message.
        temperature: of the sampling; 0 takes the most likely token each time.
        max_new_tokens: thoughts included.
        generator: what a rewriting draws its seed from; None for torch's own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    instructions: str = REASONER_INSTRUCTIONS
    temperature: float = 0.7
    max_new_tokens: int = 4096
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: a model without a head, a tokenizer without a chat template, numbers out of range.
        """
        if not isinstance(self.model, GenerationMixin):
            raise ValueError(f"{type(self.model).__name__} has no head to write with; load the model with head=True")
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; load the one of the model's repository")
        if self.temperature < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"temperature is {self.temperature} and max_new_tokens {self.max_new_tokens}; give at least 0 and 1"
            )

    def __call__(self, prompt: str) -> str:
        """The raw answer to a prompt, control tokens included.

        Raises:
            ValueError: the answer did not end within ``max_new_tokens``.
        """
        model: Any = self.model
        encoded: Any = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": self.instructions}, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            reasoning_effort="low",
            return_tensors="pt",
            return_dict=True,
        )
        asked = encoded["input_ids"].shape[1]
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        device = "cpu" if self.generator is None else self.generator.device
        seed = int(torch.randint(1 << 62, (), generator=self.generator, device=device))
        # generate() takes no generator.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(seed)
            tokens = model.generate(
                **encoded.to(model.device),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        answer = str(self.tokenizer.decode(tokens[0, asked:], skip_special_tokens=False))
        if len(tokens[0]) == asked + self.max_new_tokens and int(tokens[0, -1]) not in _end_tokens(model):
            raise ValueError(f"the answer did not end within {self.max_new_tokens} tokens; raise max_new_tokens")
        return answer


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
