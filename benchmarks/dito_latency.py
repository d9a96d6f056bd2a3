"""How much of the FLOPs that token reduction saves is time saved, and what it costs itself.

Claims measured (this library's targets): a Reduction step reaches at least 90 % of its FLOP ceiling, in every scope;
matching takes at most 0.5 % of a block, averaged over an interval of four steps, and so does moving rows (reduce and
recover). On a GPU also a whole FLUX: at ratio 0.5 with one dense step in four, latency at least 18.6 % lower with
attention alone, and lower still with the MLP.

Two ceilings are printed. The *FLOP ceiling* is the ratio of multiply-adds of a dense and a Reduction step. The *time
ceiling* weighs the same operations with the rates that this machine reaches, measured in the same run: on CPUs a
multiply-add of attention takes several times as long as one of a matrix product, so that leaving out attention gains
more than FLOPs tell.

A CPU takes minutes for one block of FLUX at 1024 px. ``--scale s`` shrinks the number of tokens and the width by the
same factor: the shares of attention and MLP are those of full size, FLOPs are fewer by s cubed. What token reduction
costs itself weighs more at a smaller width, and is measured at full size.

    python benchmarks/dito_latency.py
    python benchmarks/dito_latency.py --families flux --pixels 1024 --scale 0.25 --repeats 3
    python benchmarks/dito_latency.py --families            # what it costs itself, and a model over an interval, only
    python benchmarks/dito_latency.py --device cuda --repeats 10
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from wellposed.dito.adapters import Rows, find_blocks
from wellposed.dito.baselines import tomesd
from wellposed.dito.config import Recovery, TokenReductionConfig
from wellposed.dito.forecast import Forecast, block_flops, forecast
from wellposed.dito.hooks import apply_token_reduction
from wellposed.dito.matching import BipartiteMatcher, TokenWindows
from wellposed.dito.schedule import FixedInterval, MatchingSteps
from wellposed.evaluation.speed import Clock, Comparison, comparable_clock, time_calls
from wellposed.recipes.device import resolved_device
from wellposed.report.record import write_result

CEILING_TARGET, OVERHEAD_TARGET, LATENCY_TARGET = 0.9, 0.005, 0.186
INTERVAL = 4
FEATURES = 64  # of whatever goes into a model; only blocks matter here


@dataclass(frozen=True, kw_only=True)
class Family:
    """Blocks of one kind at the sizes of the published model.

    Attributes:
        heads: at full width.
        text: text tokens at full length.
        build: of the number of heads.
        cpu_scale: of a run without ``--scale`` on a CPU, at 1024 px; half of it at 2048 px.
    """

    heads: int
    text: int
    build: Callable[[int], nn.Module]
    cpu_scale: float


def flux(heads: int, dual: int = 1, single: int = 0) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=FEATURES,
        num_layers=dual,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=FEATURES,
        pooled_projection_dim=FEATURES,
    )


def flux2(heads: int) -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=FEATURES,
        num_layers=0,
        num_single_layers=1,
        num_attention_heads=heads,
        joint_attention_dim=FEATURES,
        guidance_embeds=False,
    )


def sd3(heads: int) -> nn.Module:
    """Two blocks: the last one of every SD3 ends the text stream and is not like the others."""
    return SD3Transformer2DModel(
        sample_size=64,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=FEATURES,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=FEATURES,
        pos_embed_max_size=128,
    )


FAMILIES = {
    "flux": Family(heads=24, text=512, build=flux, cpu_scale=0.5),
    "sd3": Family(heads=24, text=333, build=sd3, cpu_scale=1.0),
    "flux2": Family(heads=48, text=512, build=flux2, cpu_scale=0.25),
}


def compared(schedule: MatchingSteps | FixedInterval, ratio: float) -> dict[str, TokenReductionConfig]:
    """What is compared with a dense step."""

    def ours(scope: Any, keep_kv: bool, recovery: Any) -> TokenReductionConfig:
        return TokenReductionConfig(
            ratio=ratio,
            scope=scope,
            keep_kv=keep_kv,
            recovery=recovery,
            schedule=schedule,
            end_dense_steps=0,  # the generation is endless
        )

    return {
        "attn": ours("attn", False, "copy"),
        "block": ours("block", False, "copy"),
        "attn, dense K/V": ours("attn", True, "copy"),
        "block, dense K/V": ours("block", True, "copy"),
        "block, dense K/V, delta": ours("block", True, "delta"),
        "block, dense K/V, linear": ours("block", True, "linear"),
        "ToMeSD, attn": tomesd(ratio),
        "ToMeSD, block": tomesd(ratio, scope="block"),
    }


class Bench:
    """A model of a family with random weights, and calls of it with and without token reduction.

    All share the weights; each has hooks and a time of its own, which starts at a Matching step.
    """

    def __init__(
        self, model: nn.Module, rows: int, columns: int, num_text: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.rows, self.columns, self.num_text = rows, columns, num_text
        self.inputs = self._inputs()

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    def _inputs(self) -> dict[str, Any]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        generator = torch.Generator().manual_seed(1)
        prompt = {"encoder_hidden_states": noise(1, self.num_text, FEATURES), "return_dict": False}
        if isinstance(self.model, SD3Transformer2DModel):
            latents = noise(1, self.model.config["in_channels"], 2 * self.rows, 2 * self.columns)
            return prompt | {"hidden_states": latents, "pooled_projections": noise(1, FEATURES)}
        axes = 3 if isinstance(self.model, FluxTransformer2DModel) else 4
        ids = torch.zeros(self.num_tokens, axes, device=self.device)
        ids[:, 1:3] = torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.columns)).to(ids)
        given = prompt | {
            "hidden_states": noise(1, self.num_tokens, FEATURES),
            "img_ids": ids,
            "txt_ids": torch.zeros(self.num_text, axes, device=self.device),
        }
        if axes == 3:
            given["pooled_projections"] = noise(1, FEATURES)
        return given

    def call(self, config: TokenReductionConfig | None, steps: int = 1) -> Callable[[], None]:
        """``steps`` steps of one endless generation; dense without a config."""
        model: Any = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        if config is not None:
            apply_token_reduction(model, config)
        times = (1 / (1 + step) for step in count())

        @torch.no_grad()
        def run() -> None:
            for _ in range(steps):
                model(**self.inputs, timestep=torch.tensor([next(times)], device=self.device))

        return run

    def forecast(self, config: TokenReductionConfig, steps: int = 28) -> Forecast:
        return forecast(
            self.model,
            config,
            height=16 * self.rows,
            width=16 * self.columns,
            text_tokens=self.num_text,
            num_inference_steps=steps,
        )

    def time_ceiling(self, config: TokenReductionConfig, rates: "Rates") -> float:
        """The ratio of times that matrix products and attention of a dense and of a Reduction step take."""
        found = self.forecast(config)
        kept = self.num_tokens - found.sites[0].num_reduced
        keys = self.num_tokens if config.keep_kv else kept
        dense_rows, rows = (self.num_tokens, self.num_tokens, self.num_text), (kept, keys, self.num_text)
        dense = reduced = 0.0
        for host in find_blocks(self.model):
            counted = block_flops(host)
            dense += rates.seconds(counted.whole.linear(*dense_rows), counted.whole.attention(*dense_rows))
            parts = [counted.whole] if config.scope == "block" else list(counted.attentions.values())
            for part in parts:
                reduced += rates.seconds(part.linear(*rows), part.attention(*rows))
            if config.scope == "attn":
                reduced += rates.seconds(counted.rest.linear(*dense_rows), counted.rest.attention(*dense_rows))
        return dense / reduced


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP/s of this machine at the shapes of a dense block."""

    linear: float
    attention: float

    def seconds(self, linear: int, attention: int) -> float:
        return linear / self.linear + attention / self.attention


def rates_of(bench: Bench, clock: Clock, repeats: int) -> Rates:
    """Of the MLP's first layer and of attention over the whole sequence."""
    attention: Any = find_blocks(bench.model)[0].attentions()[0][1]
    width, length = attention.inner_dim, bench.num_tokens + bench.num_text

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(bench.device, bench.dtype)

    x, weight = noise(length, width), noise(4 * width, width)
    query = noise(1, attention.heads, length, width // attention.heads)
    calls = {
        "linear": lambda: functional.linear(x, weight),
        "attention": lambda: functional.scaled_dot_product_attention(query, query, query),
    }
    timed = time_calls(calls, repeats=repeats, warmup=1, device=bench.device)
    seconds = {name: timed.timings[name].seconds(clock).median for name in calls}
    return Rates(
        linear=8 * length * width**2 / seconds["linear"], attention=4 * length**2 * width / seconds["attention"]
    )


def materialised(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With random weights, made where they are needed: a full FLUX in float32 fits few machines."""
    with torch.device("meta"):
        model = build()
    # torch's own conversion: that of diffusers warns, whatever the model.
    model = nn.Module.to(model, dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.uniform_(-0.02, 0.02, generator=generator)
    return model


def grid_of(pixels: int, scale: float) -> tuple[int, int]:
    """Rows and columns of a picture of ``pixels`` squared with a share ``scale`` of its tokens, a power of two."""
    rows = columns = pixels // 16
    while scale < 1:
        rows, columns, scale = columns // 2, rows, 2 * scale
    return rows, columns


def bench_of(name: str, pixels: int, scale: float, device: torch.device, dtype: torch.dtype) -> Bench:
    family = FAMILIES[name]
    model = materialised(lambda: family.build(round(family.heads * scale)), device, dtype)
    return Bench(model, *grid_of(pixels, scale), round(family.text * scale), device, dtype)


def blocks(bench: Bench, ratio: float, clock: Clock, repeats: int) -> dict[str, Any]:
    """One Reduction step of every setting against a dense step."""
    found = compared(MatchingSteps(steps=(0,)), ratio)
    del found["block, dense K/V, linear"]  # with one Matching step there is no line to continue
    calls = {"dense": bench.call(None)} | {name: bench.call(config) for name, config in found.items()}
    timed = time_calls(calls, repeats=repeats, warmup=1, device=bench.device)
    rates = rates_of(bench, clock, repeats)
    seconds = timed.timings["dense"].seconds(clock)
    print(f"  dense step {1000 * seconds.median:.0f} ms; GFLOP/s: linear {rates.linear / 1e9:.0f}, ", end="")
    print(f"attention {rates.attention / 1e9:.0f}")
    print(f"  {'':26}{'measured':>22} {'FLOP ceiling':>14} {'share':>6} {'time ceiling':>14} {'share':>6}")
    table: dict[str, Any] = {}
    for name, config in found.items():
        ceiling, weighted = bench.forecast(config).step_speed_up, bench.time_ceiling(config, rates)
        speed_up = faster(timed, name, clock)
        table[name] = {
            "speed_up": speed_up,
            "flop_ceiling": ceiling,
            "time_ceiling": weighted,
            "share_of_flop_ceiling": speed_up["median"] / ceiling,
            "share_of_time_ceiling": speed_up["median"] / weighted,
        }
        shares = table[name]["share_of_flop_ceiling"], table[name]["share_of_time_ceiling"]
        verdict = "" if name.startswith("ToMeSD") else verdict_of(shares[0] >= CEILING_TARGET, f">= {CEILING_TARGET}")
        if verdict:
            verdict += f" by FLOPs, {'met' if shares[1] >= CEILING_TARGET else 'missed'} by time"
        print(
            f"  {name:26}{spread(speed_up):>22} {ceiling:13.2f}x {shares[0]:6.2f} {weighted:13.2f}x {shares[1]:6.2f}"
            f"{verdict}"
        )
    return {
        "dense_seconds": seconds.median,
        "linear_flops_per_second": rates.linear,
        "attention_flops_per_second": rates.attention,
        "steps": table,
        "timings": timed.to_dict(),
    }


def overheads(bench: Bench, ratio: float, clock: Clock, repeats: int) -> dict[str, Any]:
    """Matching and moving rows beside the dense block that they belong to, in the same rounds."""
    attention: Any = find_blocks(bench.model)[0].attentions()[0][1]
    config = TokenReductionConfig(ratio=ratio)
    generator = torch.Generator().manual_seed(3)
    shape = (1, bench.num_tokens, int(attention.query_dim))
    x, output = (torch.randn(shape, generator=generator).to(bench.device, bench.dtype) for _ in range(2))
    windows = TokenWindows.of_coordinates(
        torch.cartesian_prod(torch.arange(bench.rows), torch.arange(bench.columns)), config.window
    )
    num_reduced = bench.forecast(config).sites[0].num_reduced
    matcher = BipartiteMatcher()

    def match() -> Rows:
        return Rows.around(matcher(output, windows, num_reduced, generator=generator), 0, bench.num_tokens)

    rows = match()
    offset, slope = rows.own_minus_target(output), rows.own_minus_target(x)
    reduced, elapsed = rows.reduce(x, "prune"), torch.full((), 2.0, device=bench.device, dtype=bench.dtype)

    def attention_rows() -> None:
        rows.reduce(x, "prune")
        rows.recover(reduced)

    def block_rows(recovery: Recovery) -> None:
        rows.reduce(x, "prune")
        z, added = rows.recover(reduced), rows.own_minus_target(x)
        if recovery != "copy":
            added += offset if recovery == "delta" else torch.addcmul(offset, slope, elapsed)
        z.flatten(0, 1).index_add_(0, rows.dropped_rows, added)

    def merge() -> None:
        rows.recover(rows.reduce(x, "merge"))

    calls = {
        "dense block": bench.call(None),
        "match": match,
        "reduce, recover: attn": attention_rows,
        "reduce, recover: block": lambda: block_rows("copy"),
        "reduce, recover: block, delta": lambda: block_rows("delta"),
        "reduce, recover: block, linear": lambda: block_rows("linear"),
        "merge, recover": merge,
    }
    timed = time_calls(calls, repeats=repeats, warmup=1, device=bench.device)
    seconds = timed.timings["dense block"].seconds(clock).median
    print(f"  dense block {1000 * seconds:.0f} ms, of which")
    shares: dict[str, Any] = {}
    for name in list(calls)[1:]:
        share = timed.ratio(name, clock=clock).median
        shares[name] = share
        line = f"  {name:32}{share:8.3%}"
        if name == "match":
            share /= INTERVAL
            line += f", {share:.3%} of a block averaged over {INTERVAL} steps"
        if name != "merge, recover":
            line += verdict_of(share <= OVERHEAD_TARGET, f"<= {OVERHEAD_TARGET:.1%}")
        print(line)
    return {"dense_seconds": seconds, "shares": shares, "interval": INTERVAL, "timings": timed.to_dict()}


def whole_interval(bench: Bench, ratio: float, clock: Clock, repeats: int) -> dict[str, Any]:
    """A model with matching and all: an interval of steps, one of them dense, against as many dense ones."""
    found = compared(FixedInterval(interval=INTERVAL), ratio)
    calls = {"dense": bench.call(None, INTERVAL)}
    calls |= {name: bench.call(config, INTERVAL) for name, config in found.items()}
    timed = time_calls(calls, repeats=repeats, warmup=1, device=bench.device)
    print(f"  {INTERVAL} dense steps {timed.timings['dense'].seconds(clock).median:.2f} s")
    table: dict[str, Any] = {}
    for name, config in found.items():
        predicted, speed_up = bench.forecast(config, steps=INTERVAL).speed_up, faster(timed, name, clock)
        lower = 1 - 1 / speed_up["median"]
        table[name] = {"speed_up": speed_up, "predicted_by_flops": predicted, "latency_reduction": lower}
        verdict = "" if name.startswith("ToMeSD") else verdict_of(lower >= LATENCY_TARGET, f">= {LATENCY_TARGET:.1%}")
        print(
            f"  {name:26}{spread(speed_up):>22}, {predicted:.2f}x by FLOPs; latency {lower:6.1%} lower "
            f"({1 - 1 / predicted:.1%} by FLOPs){verdict}"
        )
    return {"interval": INTERVAL, "settings": table, "timings": timed.to_dict()}


def faster(timed: Comparison, name: str, clock: Clock) -> dict[str, float]:
    """Speed-up over the baseline, with quartiles over the rounds."""
    ratio = timed.ratio(name, clock=clock)
    return {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low}


def spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f}x [{value['low']:.2f}, {value['high']:.2f}]"


def verdict_of(is_met: bool, target: str) -> str:
    return f"  target {target}: {'met' if is_met else 'missed'}"


def faster_dtype(repeats: int = 5) -> torch.dtype:
    """bfloat16 or float32, whichever this CPU multiplies faster."""
    generator = torch.Generator().manual_seed(0)
    matrices = {
        dtype: torch.randn(1024, 1024, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    calls = {str(dtype): (lambda m=matrix: m @ m) for dtype, matrix in matrices.items()}
    timed = time_calls(calls, repeats=repeats, warmup=1)
    return min(matrices, key=lambda dtype: timed.timings[str(dtype)].seconds("process").median)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--pixels", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--scale", type=float, help="power of two up to 1, of tokens and width; 1 on a GPU by default")
    parser.add_argument("--overhead-scale", type=float, default=1.0, help="the same for matching and moving rows")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    started = datetime.now(UTC)
    device = resolved_device(chosen.device)
    on_gpu = device.type == "cuda"
    clock = comparable_clock(device)
    usual = torch.bfloat16 if on_gpu else faster_dtype()
    dtype = getattr(torch, chosen.dtype) if chosen.dtype else usual
    print(f"{device}, {dtype}, ratio {chosen.ratio:g}, {clock} time")
    metrics: dict[str, Any] = {"blocks": {}}
    for pixels in chosen.pixels:
        for name in chosen.families:
            usual_scale = 1.0 if on_gpu else FAMILIES[name].cpu_scale * 1024 / pixels
            scale = chosen.scale or usual_scale
            bench = bench_of(name, pixels, scale, device, dtype)
            print(f"\n{name}, {pixels} px, scale {scale:g}: {bench.num_tokens} image, {bench.num_text} text tokens")
            metrics["blocks"][f"{name}, {pixels} px, scale {scale:g}"] = blocks(
                bench, chosen.ratio, clock, chosen.repeats
            )
            del bench
    scale = chosen.overhead_scale
    print(f"\nwhat it costs itself: a block of FLUX, 1024 px, scale {scale:g}")
    metrics["overheads"] = overheads(bench_of("flux", 1024, scale, device, dtype), chosen.ratio, clock, chosen.repeats)
    depth = (19, 38) if on_gpu else (1, 2)
    scale = chosen.scale or (1.0 if on_gpu else 0.25)
    print(f"\na FLUX of {depth[0]} dual and {depth[1]} single blocks, 1024 px, scale {scale:g}")
    family = FAMILIES["flux"]
    model = materialised(lambda: flux(round(family.heads * scale), *depth), device, dtype)
    bench = Bench(model, *grid_of(1024, scale), round(family.text * scale), device, dtype)
    metrics["model"] = {"depth": depth, "scale": scale} | whole_interval(bench, chosen.ratio, clock, chosen.repeats)
    targets = {"share_of_ceiling": CEILING_TARGET, "overhead": OVERHEAD_TARGET, "latency_reduction": LATENCY_TARGET}
    record = vars(chosen) | {"dtype": dtype, "clock": clock, "targets": targets}
    part = "" if chosen.families else "-whole"
    name = f"dito-latency{part}-{str(dtype).removeprefix('torch.')}"
    print(write_result(name, metrics, record, seed=0, started=started))


if __name__ == "__main__":
    main()
