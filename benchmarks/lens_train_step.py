"""What a training step of Lens costs, beside the operations it amounts to; and its checkpoint.

Claims measured:

* operations counted as a step runs are those of ``training_flops``, by which runs are accounted;
* their share of what the device could compute at its peak (MFU), for a square of each base with the batch published for
  it, with and without gradient checkpointing; target 45 % on a GPU;
* what the loop adds to a forward, a backward and an AdamW step written out: clipping, the averaged weights, metrics by
  noise level, the check for what is not finite;
* a checkpoint: its bytes, seconds to write and to resume from, and that the next step has the uninterrupted run's loss.

With ``--device cuda`` the network is the published one, 4.1e9 float32 weights under bfloat16 autocast: with AdamW's two
moments and gradients 66 GB, and 82 with averaged weights (``--average``), activations on top. A batch that does not fit
is halved until it does. On a CPU the same code runs on a small network. Images are encoded beforehand here.

    python benchmarks/lens_train_step.py
    python benchmarks/lens_train_step.py --device cuda --average
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellposed.evaluation.speed import Clock, comparable_clock, time_calls
from wellposed.lens.objectives import PackedImages, freeze_unread, text_to_image_objective, training_flops
from wellposed.lens.presets import TRAINING_BUCKETS
from wellposed.lens.text_encoder import TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.device import resolved_device
from wellposed.report.record import write_result
from wellposed.training import Player, Run, StepContext, TrainingConfig
from wellposed.training.checkpoint import CheckpointStore, Progress
from wellposed.training.distributed import worker_group
from wellposed.training.flops import FlopCounter, arithmetic_of, device_peak

NETWORK = "network"
TEXT_TOKENS = 180  # of a caption of 109 words
TARGET = 0.45
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "inner_dim": 384,
    "enc_hidden_dim": 256,
}
SMALL_SHAPES = {256: 4, 384: 2}  # pixels of a side, images


@dataclass(frozen=True, kw_only=True)
class EncodedShare:
    """Images as the network sees them, with captions, of which only the number is read here."""

    tokens: Tensor
    captions: tuple[str, ...]
    grid: tuple[int, int]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OneShare:
    """The same share in every step."""

    share: EncodedShare

    @property
    def batch_size(self) -> int:
        return len(self.share.captions)

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        assert parts == 1
        return (range(self.batch_size),)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> EncodedShare:
        return self.share

    def fingerprint(self) -> dict[str, int | str]:
        return {"images": self.batch_size, "tokens": self.share.tokens.shape[1]}


def encoded(pixels: int, batch_size: int, channels: int, device: torch.device) -> OneShare:
    """A share of noise."""
    side = pixels // 16
    tokens = torch.randn(batch_size, side * side, channels, generator=torch.Generator().manual_seed(pixels))
    return OneShare(
        share=EncodedShare(tokens=tokens.to(device), captions=("a caption",) * batch_size, grid=(side, side))
    )


def as_packed(share: Any, context: StepContext) -> PackedImages:
    return PackedImages(share.tokens, *share.grid)


def features_of(
    network: LensTransformer2DModel, length: int, device: torch.device
) -> Callable[[Sequence[str]], TextFeatures]:
    """The same features for every caption."""
    taps, width = len(network.config["selected_layer_index"]), network.config["enc_hidden_dim"]
    one = torch.randn(1, taps, length, width, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(1, length, dtype=torch.bool, device=device)

    def features(captions: Sequence[str]) -> TextFeatures:
        count = len(captions)
        return TextFeatures(hidden_states=one.expand(count, -1, -1, -1), mask=mask.expand(count, -1))

    return features


def built(fields: dict[str, Any], device: torch.device) -> LensTransformer2DModel:
    """With random weights, made where they are needed."""
    torch.manual_seed(0)
    with device:
        network = LensTransformer2DModel(**fields)
    freeze_unread(network)
    return network


def player_of(network: LensTransformer2DModel, text_tokens: int, device: torch.device, average: float | None) -> Player:
    features = features_of(network, text_tokens, device)
    # Text is never dropped, so that operations can be told from shapes.
    objective: Any = text_to_image_objective(as_packed, features, caption_dropout=0.0)  # pyright: ignore[reportArgumentType]
    optimizer = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)
    return Player(
        name=NETWORK, model=network, objective=objective, optimizer=optimizer, ema_decay=average, clip_norm=1.0
    )


def written_out(run: Run, data: OneShare, text_tokens: int, counter: FlopCounter | None = None) -> None:
    """A forward, a backward, an AdamW step, and nothing else; with a counter, counted and without the update."""
    live = run.players[NETWORK]
    network: Any = live.model
    share, device = data.share, run.workers.device
    features = features_of(network, text_tokens, device)(share.captions)
    t, noise = torch.rand(data.batch_size, device=device), torch.randn_like(share.tokens)
    level = t[:, None, None]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.config.precision == "bf16")
    with autocast, counter.forward() if counter else nullcontext():
        predicted = network(
            (1 - level) * share.tokens + level * noise,
            features.layers,
            features.mask,
            t,
            [(1, *share.grid)] * data.batch_size,
        ).sample
        loss = (predicted.float() - (noise - share.tokens)).square().mean()
    with counter.backward() if counter else nullcontext():
        loss.backward()
    if not counter:
        live.optimizer.step()
    live.optimizer.zero_grad(set_to_none=True)


def with_checkpointing(run: Run, data: OneShare) -> None:
    """A step that computes every block twice."""
    network: Any = run.models[NETWORK]
    network.enable_gradient_checkpointing()
    try:
        run.advance(data)
    finally:
        network.disable_gradient_checkpointing()


def fitting(run: Run, pixels: int, batch_size: int, channels: int) -> OneShare:
    """The share, halved until a step of it fits the device with gradient checkpointing."""
    while True:
        data = encoded(pixels, batch_size, channels, run.workers.device)
        try:
            with_checkpointing(run, data)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
        else:
            return data


def fits(call: Callable[[], None]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def one_shape(
    run: Run, pixels: int, batch_size: int, text_tokens: int, peak: float, clock: Clock, repeats: int
) -> dict[str, Any]:
    """Operations, seconds and MFU of steps of one shape."""
    network: Any = run.models[NETWORK]
    device = run.workers.device
    data = fitting(run, pixels, batch_size, network.config["in_channels"])
    image_tokens = data.share.tokens.shape[1]
    counter = FlopCounter()
    network.enable_gradient_checkpointing()  # what is computed twice counts once, and there may be no room without
    written_out(run, data, text_tokens, counter)
    network.disable_gradient_checkpointing()
    flops = data.batch_size * training_flops(network, image_tokens, text_tokens)
    calls: dict[str, Callable[[], None]] = {
        "written out": lambda: written_out(run, data, text_tokens),
        "loop": lambda: run.advance(data),
        "loop, gradient checkpointing": lambda: with_checkpointing(run, data),
    }
    calls = {name: call for name, call in calls.items() if fits(call)}
    timed = time_calls(calls, repeats=repeats, warmup=1, device=device)
    print(
        f"\n{pixels} px: {data.batch_size} of {batch_size} images, {image_tokens} image and {text_tokens} text tokens; "
        f"{counter.flops:.4e} FLOPs counted, {counter.flops / flops:.4f} of the formula"
    )
    steps: dict[str, Any] = {}
    for name in calls:
        seconds = timed.timings[name].seconds(clock).median
        mfu = flops / seconds / peak
        ratio = timed.ratio(name, clock=clock)
        memory = timed.timings[name].peak_bytes
        steps[name] = {"seconds": seconds, "mfu": mfu, "ratio": ratio.median, "peak_bytes": memory}
        print(
            f"  {name:30}{seconds:8.3f} s  {data.batch_size / seconds:8.2f} images/s  MFU {mfu:6.1%}  "
            f"{ratio}x" + ("" if memory is None else f"  {memory / 1e9:.1f} GB on top")
        )
    return {
        "images": data.batch_size,
        "image_tokens": image_tokens,
        "flops": {"counted": counter.flops, "formula": flops, "ratio": counter.flops / flops},
        "steps": steps,
        "timings": timed.to_dict(),
    }


def checkpoint(run: Run, pixels: int, batch_size: int) -> dict[str, Any]:
    """Write, go a step, go back to what was written, go that step again."""
    live = run.players[NETWORK]
    network: Any = live.model
    data = encoded(pixels, batch_size, network.config["in_channels"], run.workers.device)
    step, updates = run.step, live.updates
    progress = Progress(
        step=step, seed=0, data=data.fingerprint(), updates={NETWORK: updates}, metrics=run.metrics, usage={}
    )
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), run.workers, keep_last=1)
        started = time.perf_counter()
        path = store.save({NETWORK: live.state_dict()}, progress)
        write = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
        with_checkpointing(run, data)
        straight = run.metrics[f"{NETWORK}/loss"], run.metrics[f"{NETWORK}/grad_norm"]
        started = time.perf_counter()
        state = {NETWORK: live.state_dict()}
        store.load(path, state)
        live.load_state_dict(state[NETWORK], updates)
        read = time.perf_counter() - started
    run.step = step
    with_checkpointing(run, data)
    again = run.metrics[f"{NETWORK}/loss"], run.metrics[f"{NETWORK}/grad_norm"]
    print(
        f"\ncheckpoint of {size / 1e9:.2f} GB: written in {write:.1f} s, read in {read:.1f} s; the next step has "
        f"{'the same loss and gradient, bit for bit' if straight == again else f'{again}, not {straight}'}"
    )
    return {"bytes": size, "write_seconds": write, "read_seconds": read, "straight": straight, "resumed": again}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="bf16 on a GPU by default, else fp32")
    parser.add_argument("--average", action="store_true", help="keep averaged weights: 16 GB of the published network")
    parser.add_argument("--layers", type=int, help="fewer blocks, where memory or disk are short")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)
    started = datetime.now(UTC)
    device = resolved_device(chosen.device)
    on_gpu = device.type == "cuda"
    clock = comparable_clock(device)
    precision = chosen.precision or ("bf16" if on_gpu else "fp32")
    fields = ({} if on_gpu else SMALL) | ({} if chosen.layers is None else {"num_layers": chosen.layers})
    published = {base: TRAINING_BUCKETS.batch_sizes[base] for base in sorted(TRAINING_BUCKETS.batch_sizes)}
    shapes = published if on_gpu else SMALL_SHAPES
    with worker_group(chosen.device) as workers:
        network = built(fields, workers.device)
        config = TrainingConfig(max_steps=1, precision=precision, device=chosen.device, progress=False)
        average = 0.9999 if chosen.average or not on_gpu else None
        run = Run([player_of(network, chosen.text_tokens, workers.device, average)], config, workers)
        count = sum(weight.numel() for weight in network.parameters())
        peak = device_peak(workers.device, arithmetic_of(precision, network.parameters(), workers.device))
        print(
            f"{device}, {precision}, {clock} time; {count:,} weights, peak {peak.flop_per_second:.3e} FLOP/s "
            f"({peak.source})"
        )
        metrics: dict[str, Any] = {"weights": count, "peak": peak, "target_mfu": TARGET, "shapes": {}}
        for pixels, batch_size in shapes.items():
            metrics["shapes"][str(pixels)] = one_shape(
                run, pixels, batch_size, chosen.text_tokens, peak.flop_per_second, clock, chosen.repeats
            )
        metrics["checkpoint"] = checkpoint(run, min(shapes), 1)
    name = f"lens-train-step-{precision}"
    print(write_result(name, metrics, vars(chosen) | {"fields": fields}, seed=0, started=started))


if __name__ == "__main__":
    main()
