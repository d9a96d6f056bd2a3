"""How many pictures a core curates in a second, stage by stage.

Measured on one core, in its own time, which other processes do not disturb:

* every filter that needs no network, on JPEG pictures of about a megapixel, beside decoding them whole and doing
  nothing else. What is measured is measured on pictures that JPEG's decoder has reduced, so that all filters together
  cost about as much as that;
* our embedding, writing shards, and the search for near duplicates, all with all, by blocks and by faiss if it is here.

Without a folder the pictures are crops of scikit-image's photographs (extra ``demo``), enlarged and lightly noisy.

    python benchmarks/lens_curation.py
    python benchmarks/lens_curation.py --data path/to/pictures --count 500
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wellposed.data.shards import ShardSample, write_shards
from wellposed.lens.curation import CurationConfig, CurationTools
from wellposed.lens.curation_pictures import decode_quietly
from wellposed.lens.curation_scorers import DctEmbedder
from wellposed.lens.curation_sources import Address, SampleReader, list_samples
from wellposed.lens.curation_stages import UnitPictures, picture_stages
from wellposed.lens.curation_tables import Record
from wellposed.lens.near_duplicates import SearchBackend, similar_pairs
from wellposed.report.record import write_result

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (1152, 896)


def make_pictures(folder: Path, count: int, seed: int) -> None:
    from skimage import data

    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in NAMES]
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (int(rng.integers(side // 3)) for side in photograph.size)
        box = (left, top, left + photograph.width * 2 // 3, top + photograph.height * 2 // 3)
        larger = np.asarray(photograph.resize(SIZE, Image.Resampling.BICUBIC, box=box), np.float32)
        noisy = np.clip(larger + rng.normal(scale=3, size=larger.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.jpg", quality=90)


def timed(what: str, work: Callable[[], Any], count: int, found: dict[str, float]) -> Any:
    start = time.process_time()
    result = work()
    found[what] = count / max(time.process_time() - start, 1e-9)
    print(f"  {what:24}{found[what]:12.0f} images/s")
    return result


def stages(source: Path, count: int) -> dict[str, Any]:
    config = CurationConfig()
    found: dict[str, float] = {}
    addresses = [a for a in list_samples(source, config.image_column) if isinstance(a, Address)][:count]
    records = [Record(key=f"{n:010d}", address=address) for n, address in enumerate(addresses)]
    print(f"{len(records)} pictures")
    with SampleReader(source, config.image_column) as reader:
        contents = timed("read", lambda: [reader.picture(address) for address in addresses], len(records), found)
        limit = config.max_pixels
        timed("decode, nothing else", lambda: [decoded_size(c, limit) for c in contents], len(records), found)
        pictures = UnitPictures(reader, config)
        begun = time.process_time()
        for stage in picture_stages(config, CurationTools()):
            judge, seen = stage.judge, records
            judged = timed(stage.name, lambda: list(judge(seen, pictures)), len(seen), found)  # noqa: B023 - called at once
            records = [record for record in judged if record.kept]
        found["all filters"] = len(addresses) / (time.process_time() - begun)
        print(f"  {'all filters':24}{found['all filters']:12.0f} images/s")
        embedder = DctEmbedder()
        timed("embedding (ours)", lambda: [embedder([pictures.measured(r)]) for r in records], len(records), found)
        samples = [
            ShardSample(key=r.key, picture=pictures.content(r), caption="a picture of no one in particular")
            for r in records
        ]
    with tempfile.TemporaryDirectory() as folder:
        timed("shards", lambda: write_shards(samples, folder), len(samples), found)
    return {"images_per_second": found, "seen": len(addresses), "kept": len(records)}


def decoded_size(content: bytes, limit: int) -> int:
    try:
        return decode_quietly(content, max_pixels=limit).width
    except ValueError:
        return 0


def duplicates(count: int, width: int, seed: int) -> dict[str, Any]:
    """All with all; the number of comparisons grows with the square of that of pictures."""
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    vectors[count // 2 :: 7] = vectors[: len(vectors[count // 2 :: 7])] * 1.5
    found: dict[str, Any] = {}
    backends: tuple[SearchBackend, ...] = ("torch", "faiss") if importlib.util.find_spec("faiss") else ("torch",)
    for backend in backends:
        start = time.process_time()
        pairs = sum(len(some) for some in similar_pairs(vectors, 0.985, backend=backend))
        seconds = time.process_time() - start
        found[backend] = {"seconds": seconds, "pairs": pairs, "comparisons_per_second": count**2 / 2 / seconds}
        print(f"  near duplicates by {backend:6} {count} x {width}: {seconds:.2f} s, {pairs} pairs")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of pictures, a .parquet or a .tar file")
    parser.add_argument("--count", type=int, default=60, help="pictures")
    parser.add_argument("--vectors", type=int, default=10_000, help="embeddings to compare")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.data is None:
            make_pictures(Path(folder), chosen.count, chosen.seed)
        metrics = stages(chosen.data or Path(folder), chosen.count)
    metrics["near_duplicates"] = duplicates(chosen.vectors, 287, chosen.seed)
    notes = ["images a second of one core, in its own time"]
    print(write_result("lens-curation", metrics, vars(chosen), seed=chosen.seed, started=started, notes=notes))


if __name__ == "__main__":
    main()
