"""What a step of text-to-image training amounts to: words, tokens, operations."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from wellposed.batches import TextImageBatch
from wellposed.data.bucketed import BucketedBatches
from wellposed.data.words import word_count
from wellposed.lens.objectives import training_flops
from wellposed.lens.text_encoder import LensTextEncoder
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.lens_base import BaseTextEncoder

__all__ = ["CountedCaptions"]


class CountedCaptions:
    """Batches of captioned images, which say what each step amounts to; see ``wellposed.training.usage``.

    A share is counted when its batch is fetched: by the rank that computes it, and in the thread that fetches ahead.

    Operations are the network's own: those of autoencoder and text encoder, of padding and of recomputation are not
    counted, as in the paper's comparison.

    Args:
        planned: the batches.
        network: what is trained on them, with frozen what is not.
        text_encoder: whose tokens its text is.
        side: pixels to a side of an image token.
    """

    def __init__(
        self,
        planned: BucketedBatches,
        network: LensTransformer2DModel,
        text_encoder: LensTextEncoder | BaseTextEncoder,
        *,
        side: int,
    ) -> None:
        self.planned = planned
        self.side = side
        # Its own: threads must not tokenise with one whose padding the encoder changes meanwhile.
        self.tokenizer = copy.deepcopy(text_encoder.tokenizer)
        frame = text_encoder.template.frame(self.tokenizer)
        self.suffix = len(frame.suffix)
        self.most = text_encoder.template.max_length - len(frame.prefix)
        # Operations are a + b n + c s + d (n + s)^2 in image and text tokens; four values tell the four numbers.
        at = {(n, s): training_flops(network, n, s) for n, s in ((0, 0), (1, 0), (0, 1), (1, 1))}
        self.square = (at[1, 1] - at[1, 0] - at[0, 1] + at[0, 0]) / 2
        self.once = at[0, 0]
        self.by_image, self.by_text = (at[place] - self.once - self.square for place in ((1, 0), (0, 1)))
        self._fetched: dict[tuple[int, int], Counter[str]] = {}

    @property
    def batch_size(self) -> int:
        """That of the batches."""
        return self.planned.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """That of the batches."""
        return self.planned.steps_per_epoch

    @property
    def captioning_cost(self) -> Mapping[str, float]:
        """That of the batches."""
        return self.planned.captioning_cost

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        """Those of the batches."""
        return self.planned.shares_at(step, parts)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> TextImageBatch:
        """One share, with its captions."""
        batch = self.planned.batch_at(step, part, parts)
        self._fetched[step, part] = self._counted(batch)
        return batch

    def fingerprint(self) -> Mapping[str, int | str]:
        """That of the batches."""
        return self.planned.fingerprint()

    def counts_at(self, step: int, part: int = 0, parts: int = 1) -> dict[str, float]:
        """Sums over every ``parts``-th share of a step: "caption_words", "image_tokens", "text_tokens", "flops"."""
        totals: Counter[str] = Counter()
        for share in range(part, self.planned.shares, parts):
            if (step, share) not in self._fetched:
                self.batch_at(step, share, self.planned.shares)
            totals.update(self._fetched.pop((step, share)))
        return {name: float(amount) for name, amount in totals.items()}

    def _counted(self, batch: TextImageBatch) -> Counter[str]:
        height, width = batch.images.shape[2:]
        image = (height // self.side) * (width // self.side)
        totals: Counter[str] = Counter()
        for caption, text in zip(batch.captions, self._text_tokens(batch.captions), strict=True):
            flops = self.once + self.by_image * image + self.by_text * text + self.square * (image + text) ** 2
            totals.update(
                {
                    "caption_words": word_count(caption),
                    "image_tokens": image,
                    "text_tokens": text,
                    "flops": round(flops),
                }
            )
        return totals

    def _text_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption that the network sees."""
        encoded: Any = self.tokenizer(list(captions), add_special_tokens=False)
        return [min(len(text) + self.suffix, self.most) for text in encoded["input_ids"]]
