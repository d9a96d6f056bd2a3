"""Captions from a vision model of transformers in memory.

::

    caption = LocalCaptioner.from_pretrained("Qwen/Qwen3-VL-4B-Instruct", device="cuda", dtype=torch.bfloat16)
    results = caption([CaptionRequest(key="0", picture=Path("0.jpg").read_bytes(), metadata={})])
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from wellposed.lens.caption_writer import CaptionWriter, decode_for_captioner, read_caption
from wellposed.lens.captioning import CaptionRequest, CaptionResult

__all__ = ["LocalCaptioner"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalCaptioner(CaptionWriter):
    """Asks a model that reads pictures and text and writes text, always taking the most likely token.

    A call gives one result for each request, in their order. A batch on which the model fails, such as for want of
    memory, is halved until it is one picture, whose error that is.

    Reasons of errors: ``no picture``, ``failed``, ``empty``, ``no letters``, ``refused``, ``cut off``, ``too long``,
    ``repeats the instructions``.

    Attributes:
        model: with its head, as ``AutoModelForImageTextToText`` loads it.
        processor: of the model, with a chat template.
        batch_size: pictures at a time.
        max_new_tokens: of an answer; one that does not end within is cut off and no caption.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    batch_size: int = 8
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: see :class:`CaptionWriter`; a processor without a chat template or a token for padding, a model
                without a token for the end; numbers below 1.
        """
        super().__post_init__()
        if not isinstance(self.processor, ProcessorMixin) or not self.processor.chat_template:
            raise ValueError(
                f"{type(self.processor).__name__} reads no pictures or has no chat template; "
                "take a model that follows instructions about pictures"
            )
        if self.processor.tokenizer.pad_token is None:
            raise ValueError("the tokenizer has no token for padding; set tokenizer.pad_token = tokenizer.eos_token")
        if self.model.generation_config.eos_token_id is None:
            raise ValueError("the model knows no token for the end; set model.generation_config.eos_token_id")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and max_new_tokens {self.max_new_tokens}; give at least 1"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> "LocalCaptioner":
        """One of a model of transformers, from a folder or the hub.

        Args:
            path: of the model.
            device: where it works.
            dtype: of its weights; None for that of the file.
            fields: of this class, such as ``instructions``.

        Raises:
            OSError: no such model.
            ValueError: a model of another kind, or bad fields.
        """
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or "auto")
        return cls(model=model.to(device), processor=AutoProcessor.from_pretrained(path), **fields)

    @property
    def identity(self) -> dict[str, Any]:
        """What captions depend on, for whoever keeps them."""
        return super().identity | {"model": self.model.name_or_path}

    @property
    def at_a_time(self) -> int:
        """How many requests a call should have, at least: a batch."""
        return self.batch_size

    def __call__(self, requests: Sequence[CaptionRequest]) -> list[CaptionResult]:
        """A result for each request."""
        return self.ask(requests, lambda result: None)

    def ask(
        self, requests: Sequence[CaptionRequest], on_result: Callable[[CaptionResult], None]
    ) -> list[CaptionResult]:
        """A result for each request, told after its batch."""
        results: list[CaptionResult] = []
        for start in range(0, len(requests), self.batch_size):
            batch = self._results(requests[start : start + self.batch_size])
            for result in batch:
                on_result(result)
            results += batch
        return results

    def _results(self, requests: Sequence[CaptionRequest]) -> list[CaptionResult]:
        results: dict[int, CaptionResult] = {}
        shown: dict[int, Image.Image] = {}
        for place, request in enumerate(requests):
            try:
                shown[place] = decode_for_captioner(request.picture, self.image_side)
            except ValueError as error:
                results[place] = CaptionResult(key=request.key, error=str(error))
        written = self._written([requests[place].key for place in shown], list(shown.values()))
        results |= zip(shown, written, strict=True)
        return [results[place] for place in range(len(requests))]

    def _written(self, keys: list[str], pictures: list[Image.Image]) -> list[CaptionResult]:
        if not keys:
            return []
        try:
            return self._generated(keys, pictures)
        except Exception as error:  # what a model raises over a picture is as varied as models are
            logger.warning("%s on %d pictures: %s", type(error).__name__, len(keys), error)
            if len(keys) == 1:
                return [CaptionResult(key=keys[0], error=f"failed: {type(error).__name__}: {error}")]
        # Outside of the handler, where the error, and with it the memory of the attempt, is gone.
        half = len(keys) // 2
        return self._written(keys[:half], pictures[:half]) + self._written(keys[half:], pictures[half:])

    def _generated(self, keys: list[str], pictures: list[Image.Image]) -> list[CaptionResult]:
        begin = time.monotonic()
        prompts = [self.prompt(key) for key in keys]
        model: Any = self.model
        inputs = self._inputs(prompts, pictures).to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Settings of sampling in the model's own configuration, which would be warned about.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :].cpu()
        ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        seconds = (time.monotonic() - begin) / len(keys)
        return [
            self._result(
                self.processor.decode(answers[row], skip_special_tokens=True) if ended[row].any() else None,
                prompt=prompts[row],
                key=key,
                seconds=seconds,
                prompt_tokens=int(inputs["attention_mask"][row].sum()),
                completion_tokens=int((~ended[row]).sum() + ended[row].any()),
            )
            for row, key in enumerate(keys)
        ]

    def _result(self, answer: str | None, *, prompt: str, **fields: Any) -> CaptionResult:
        """Of an answer; None for one that did not end."""
        if answer is None:
            return CaptionResult(error=f"cut off: the answer did not end within {self.max_new_tokens} tokens", **fields)
        try:
            return CaptionResult(text=read_caption(answer, prompt=prompt, max_words=self.max_words), **fields)
        except ValueError as error:
            return CaptionResult(error=str(error), **fields)

    def _inputs(self, prompts: list[str], pictures: list[Image.Image]) -> Any:
        processor: Any = self.processor
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for prompt in prompts
        ]
        begin = processor.tokenizer.bos_token
        return processor(
            text=texts,
            images=[[picture] for picture in pictures],
            # Templates that begin with the token of the beginning must not get a second one.
            add_special_tokens=begin is None or not texts[0].startswith(begin),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
