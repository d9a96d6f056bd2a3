"""Settings of curation: which filter, how strict."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["CurationConfig", "KeptDuplicate"]

KeptDuplicate = Literal["largest", "first"]

EXACT_INDEX = "Flat"


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """What is kept of a corpus, and how it is cut up. [paper] is stated in arXiv 2605.21573, the rest is ours.

    Attributes:
        unit_size: samples in a unit, the piece that is done or not done. Ours.
        max_pixels: larger pictures are rejected before they are decoded: a file of kilobytes can claim billions. Ours.
        min_area: pixels that a picture must have. [paper]
        max_nsfw: probability above which a picture is rejected. Ours.
        min_aesthetics: score of the Aesthetic Predictor v2.5 below which a picture is rejected. [paper]
        max_watermark: probability above which a picture is rejected. Ours.
        measured_area: clarity, information and exposure are measured on the picture reduced to this many pixels, so
            that they do not depend on its size. A smaller one is measured as it is: to enlarge it would blur it. Ours.
        min_clarity: variance of the Laplacian of the grey levels 0 to 255 below which a picture is blurred. Photographs
            have 50 to 5000, the same blurred over a hundredth of their width 1 to 6. Ours.
        min_information: bits of entropy of the grey levels below which a picture is blank; photographs have 5 to 8,
            a black drawing on white 1 to 2. Ours.
        min_exposure: mean of V (of HSV, 0 to 1) below which a picture is too dark. Ours; a starry sky has 0.09.
        max_exposure: mean of V above which a picture is too bright. Ours; a logo on white has 0.91.
        duplicate_cosine: cosine of two embeddings above which the pictures are near duplicates; 1 leaves them all in.
            [paper], whose embedding is CLIP ViT-L/14. Ours is another one unless that is given.
        duplicate_index: faiss's name of an index. ``"Flat"`` compares all with all; others, such as
            ``"IVF4096,Flat"``, are for corpora too large for that, need faiss and miss some pairs. Ours.
        duplicate_probes: lists of an inverted index that a search looks into. Ours.
        kept_duplicate: of each group the ``"largest"`` picture or the ``"first"`` one of the corpus. Ours.
        caption_style: name of the captions wanted, kept with every sample. Where no captioner is given the caption is
            the one of this name in the metadata field ``captions`` or, without it, the field ``caption``. "dense" is
            [paper]: descriptions of a paragraph, 109 words on average, and no others mixed in. The name is a label:
            what captions are like is up to the captioner and its instructions.
        max_caption_words: captions of more words are rejected. [paper]: under 500.
        captions_at_a_time: pictures handed to the captioner in one call, more if it asks for more at a time. What it
            answers is kept as it comes, or after the call if it does not tell it before. Ours.
        image_column: column of parquet files with the pictures.
        samples_per_shard: of the shards written. Ours.

    Raises:
        ValueError: a value out of its range.
    """

    unit_size: int = 512
    max_pixels: int = 1 << 27
    min_area: int = 384**2
    max_nsfw: float = 0.5
    min_aesthetics: float = 3.0
    max_watermark: float = 0.5
    measured_area: int = 384**2
    min_clarity: float = 10.0
    min_information: float = 1.0
    min_exposure: float = 0.05
    max_exposure: float = 0.97
    duplicate_cosine: float = 0.985
    duplicate_index: str = EXACT_INDEX
    duplicate_probes: int = 16
    kept_duplicate: KeptDuplicate = "largest"
    caption_style: str = "dense"
    max_caption_words: int = 500
    captions_at_a_time: int = 32
    image_column: str = "image"
    samples_per_shard: int = 1024

    def __post_init__(self) -> None:
        counts = (
            "unit_size",
            "max_pixels",
            "min_area",
            "measured_area",
            "duplicate_probes",
            "max_caption_words",
            "captions_at_a_time",
            "samples_per_shard",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("min_clarity", "min_information", "min_exposure"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 0, which keeps every picture")
        for name in ("max_nsfw", "max_watermark", "max_exposure"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at most 1, which keeps every picture, above 0")
        if self.min_exposure >= self.max_exposure:
            raise ValueError(
                f"min_exposure {self.min_exposure} is not below max_exposure {self.max_exposure}; nothing would be kept"
            )
        if not 0 < self.duplicate_cosine <= 1:
            raise ValueError(f"duplicate_cosine is {self.duplicate_cosine}; give at most 1, which keeps all, above 0")
        if self.kept_duplicate not in get_args(KeptDuplicate):
            raise ValueError(f"kept_duplicate is {self.kept_duplicate!r}; write 'largest' or 'first'")
        if not self.caption_style.isidentifier():
            raise ValueError(f"caption_style is {self.caption_style!r}; give one word, such as 'dense'")
