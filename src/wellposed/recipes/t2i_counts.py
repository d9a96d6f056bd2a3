"""What a step of text-to-image training amounts to: words, tokens, operations."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from wellposed.data.bucketed import BucketedBatches
from wellposed.lens.captioning import word_count
from wellposed.lens.objectives import forward_flops
from wellposed.lens.text_encoder import LensTextEncoder
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.lens_base import BaseTextEncoder

__all__ = ["CountedCaptions"]

# Forward, and backward once for the activations' gradients and once for the weights'.
PASSES = 3


class CountedCaptions:
    """Batches of captioned images, which say what each step amounts to; see ``wellposed.training.usage``.

    Operations are the network's own: those of autoencoder and text encoder, of padding and of recomputation are not
    counted, as in the paper's comparison.

    Args:
        planned: the batches.
        network: what is trained on them.
        text_encoder: whose tokens its text is.
        side: pixels to a side of an image token.
        passes: forward passes that a step costs: 3, or 2 where the weights are frozen. An adapter's own third pass,
            about a percent, is then left out.
    """

    def __init__(
        self,
        planned: BucketedBatches,
        network: LensTransformer2DModel,
        text_encoder: LensTextEncoder | BaseTextEncoder,
        *,
        side: int,
        passes: int = PASSES,
    ) -> None:
        self.planned = planned
        self.side = side
        self.tokenizer = text_encoder.tokenizer
        frame = text_encoder.template.frame(self.tokenizer)
        self.suffix = len(frame.suffix)
        self.most = text_encoder.template.max_length - len(frame.prefix)
        # Operations are a + b n + c s + d (n + s)^2 in image and text tokens; four values tell the four numbers.
        at = {(n, s): passes * forward_flops(network, n, s) for n, s in ((0, 0), (1, 0), (0, 1), (1, 1))}
        self.square = (at[1, 1] - at[1, 0] - at[0, 1] + at[0, 0]) / 2
        self.once = at[0, 0]
        self.by_image, self.by_text = (at[place] - self.once - self.square for place in ((1, 0), (0, 1)))
        self._measured = lru_cache(maxsize=1 << 16)(self._measure)

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

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Any:
        """One share, with its captions."""
        return self.planned.batch_at(step, part, parts)

    def fingerprint(self) -> Mapping[str, int | str]:
        """That of the batches."""
        return self.planned.fingerprint()

    def counts_at(self, step: int) -> dict[str, float]:
        """Sums over all shares of a step: "caption_words", "image_tokens", "text_tokens", "flops"."""
        totals: dict[str, float] = dict.fromkeys(("caption_words", "image_tokens", "text_tokens", "flops"), 0.0)
        epoch = step // self.steps_per_epoch
        for part in range(self.planned.shares):
            size = self.planned.bucket_at(step, part)
            image = (size.height // self.side) * (size.width // self.side)
            # Pictures alone have no captions, but these do.
            captioned: Any = self.planned.dataset
            for caption in captioned.captions(self.planned.indices_at(step, part), epoch=epoch):
                words, text = self._measured(caption)
                totals["caption_words"] += words
                totals["image_tokens"] += image
                totals["text_tokens"] += text
                totals["flops"] += (
                    self.once + self.by_image * image + self.by_text * text + self.square * (image + text) ** 2
                )
        return totals

    def _measure(self, caption: str) -> tuple[int, int]:
        """Words, and tokens that the network sees."""
        tokens = len(self.tokenizer(caption, add_special_tokens=False)["input_ids"]) + self.suffix
        return word_count(caption), min(tokens, self.most)
