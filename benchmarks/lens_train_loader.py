"""How fast pictures of many sizes come out of shards, against decoding and resizing them alone.

Claim measured: images per second of shards read at random, cut to buckets, turned into tensors with captions and
fetched ahead of the trainer, over images per second of Pillow decoding and resizing the same pictures to the same
sizes, from bytes in memory to arrays of bytes. Target: at least 0.9, on one core (where fetching ahead gains nothing)
and on all of this machine's (where the comparison decodes with a thread on each).

The pictures are crops of the photographs in scikit-image, enlarged, with the grain of a camera so that they take as
long to decode as photographs do, in the sizes and buckets of mixed-resolution training.

    python benchmarks/lens_train_loader.py
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import Size, cover_and_crop
from wellposed.data.shards import ShardedImages, ShardSample, write_shards
from wellposed.evaluation.speed import Clock, time_calls
from wellposed.lens.presets import TRAINING_BUCKETS
from wellposed.report.record import write_result
from wellposed.training import Prefetched

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
SIDES = (640, 1500)  # of the squares of a picture's area, in pixels
RATIOS = (1 / 2, 2)
GRAIN = 6.0  # standard deviation, in levels
WORDS = 109  # of a published caption
TARGET = 0.9


def photographs(count: int, seed: int) -> list[Image.Image]:
    """Crops of any place, ratio and size."""
    random = np.random.default_rng(seed)
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    found: list[Image.Image] = []
    for number in range(count):
        source = sources[number % len(sources)]
        side, ratio = np.exp(random.uniform(np.log((SIDES, RATIOS)).T[0], np.log((SIDES, RATIOS)).T[1]))
        size = Size(round(side * ratio**0.5), round(side / ratio**0.5))
        place = tuple(random.random(2).tolist())
        pixels = np.asarray(cover_and_crop(source, size, place=place, upscale=True), dtype=np.float32)
        grain = random.standard_normal(pixels.shape, dtype=np.float32) * GRAIN
        found.append(Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)))
    return found


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decode_and_resize(content: bytes, size: Size) -> None:
    with Image.open(io.BytesIO(content)) as picture:
        np.asarray(cover_and_crop(picture, size))


class FirstSteps:
    """Data that end, so that nothing is fetched ahead while something else is timed."""

    def __init__(self, data: BucketedBatches, steps: int) -> None:
        self.data, self.steps = data, steps

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Any:
        return self.data.batch_at(step, part, parts) if step < self.steps else None


def measured(
    data: BucketedBatches, contents: Sequence[bytes], steps: int, cores: int, clock: Clock, rounds: int
) -> dict[str, Any]:
    """Both ways over the same pictures in the same sizes."""
    work = [
        (contents[index], data.bucket_at(step, 0))
        for step in range(steps)
        for index in data.indices_at(step, 0).tolist()
    ]
    batches: Any = Prefetched(FirstSteps(data, steps), ahead=cores)  # pyright: ignore[reportArgumentType]
    with ThreadPoolExecutor(cores) as threads:

        def decode() -> None:
            list(threads.map(decode_and_resize, *zip(*work, strict=True)))

        def load() -> None:
            for step in range(steps):
                batches.batch_at(step)

        calls: dict[str, Callable[[], None]] = {"decode and resize": decode, "shards": load}
        timed = time_calls(calls, repeats=rounds, warmup=1)
    rates = {name: len(work) / timed.timings[name].seconds(clock).median for name in calls}
    ratio = timed.ratio("shards", clock=clock)
    share = 1 / ratio.median
    print(f"\n{cores} core{'s' if cores > 1 else ''}, {len(work)} images, {clock} time")
    for name, rate in rates.items():
        print(f"  {name:18}{rate:8.1f} images/s")
    print(
        f"  ratio {share:.3f} [{1 / ratio.high:.3f}, {1 / ratio.low:.3f}]  target >= {TARGET}: "
        f"{'met' if share >= TARGET else 'missed'}"
    )
    return {"cores": cores, "images": len(work), "images_per_second": rates, "ratio": share, "timings": timed.to_dict()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60, help="different pictures in the shards")
    parser.add_argument("--steps", type=int, default=4, help="shares of one bucket in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    contents = [encoded(picture) for picture in photographs(chosen.pictures, chosen.seed)]
    caption = " ".join(["word"] * WORDS)
    metrics: dict[str, Any] = {"bytes_per_picture": sum(map(len, contents)) / len(contents)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        samples = (ShardSample(key=f"{n:05d}", picture=content, caption=caption) for n, content in enumerate(contents))
        write_shards(samples, folder, samples_per_shard=40)
        dataset = ShardedImages.open(folder)
        data = BucketedBatches(dataset=dataset, buckets=TRAINING_BUCKETS, shares=1, seed=chosen.seed)
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(here)})
        stack.callback(os.sched_setaffinity, 0, here)
        # One core is shared with other processes, and CPU time says what would be left without them.
        metrics["one core"] = measured(data, contents, chosen.steps, 1, "process", chosen.rounds)
        os.sched_setaffinity(0, here)
        if len(here) > 1:
            metrics["all cores"] = measured(data, contents, chosen.steps, len(here), "wall", chosen.rounds)
    print(write_result("lens-train-loader", metrics, vars(chosen), seed=chosen.seed, started=started))


if __name__ == "__main__":
    main()
