"""What the bound of uniform diffusion costs at a real vocabulary: time, bytes kept for the backward pass, peak memory.

Claims measured (this library's targets): forward and backward of ``fused_nelbo`` take at most a quarter of the time of
the same loss written with full-vocabulary float64 tensors, and keep at most 4 bytes per bfloat16 logit. All forms take
turns in one run:

* ``fused``: the library's.
* ``float64``: the definition, every tensor over the vocabulary in float64.
* ``float64, narrowed``: the published code's mixture: log-softmax in float64, rounded to the logits' dtype, the rest in
  float32 at least.
* ``float32``: the definition in float32.
* ``cross-entropy``: PyTorch's, for scale. Another loss.

On a CPU the process keeps the memory it once had: otherwise the forms with large temporaries spend more time on having
the system clear their pages, over and over, than on arithmetic, and every ratio is several times larger.

Errors are against float64 on the same logits: the largest of a value, relative to the mean value, and of a gradient's
row in norm, relative to that row's own.

    python benchmarks/udm_loss.py
    python benchmarks/udm_loss.py --device cuda --rows 16384
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.profiler import ProfilerActivity, profile

from wellposed.evaluation.speed import Comparison, comparable_clock, saved_graph_bytes, time_calls
from wellposed.report.record import write_result
from wellposed.udm import nelbo_triton
from wellposed.udm.nelbo import fused_nelbo

TARGETS = {"float64 over fused, forward and backward": 4.0, "bytes kept per bfloat16 logit": 4.0}
NARROW_FROM = 1e-3


class Problem(NamedTuple):
    """Rows as training meets them: t uniform, x_t drawn given x_0."""

    logits: Tensor
    x_0: Tensor
    x_t: Tensor
    alpha: Tensor


def problem(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocab, generator=generator)
    x_0, noise = torch.randint(vocab, (2, rows), generator=generator)
    alpha = 1 - NARROW_FROM - (1 - 2 * NARROW_FROM) * torch.rand(rows, generator=generator, dtype=torch.float64)
    survives = torch.rand(rows, generator=generator, dtype=torch.float64) < alpha
    x_t = torch.where(survives, x_0, noise)
    # A model with an idea of the text: without one, all of the loss is in the rows that are wrong.
    logits.scatter_add_(1, x_0.unsqueeze(1), torch.full((rows, 1), 10.0))
    return Problem(logits.to(device, dtype), x_0.to(device), x_t.to(device), alpha)


def rates(log_probs: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor) -> Tensor:
    """The definition with tensors over the vocabulary, in the dtype of ``alpha``."""
    vocab = log_probs.shape[-1]
    alpha, here = alpha.to(log_probs.device).unsqueeze(1), x_t.unsqueeze(1)
    clean = vocab * alpha * one_hot(x_0, vocab) + (1 - alpha)
    modelled = vocab * alpha * log_probs.exp() + (1 - alpha)
    clean_here, modelled_here = clean.gather(1, here), modelled.gather(1, here)
    logs = clean.log() - clean_here.log() - modelled.log() + modelled_here.log()
    return ((clean / clean_here * logs).sum(1, keepdim=True) + vocab / modelled_here - vocab / clean_here)[:, 0] / vocab


def in_float64(given: Problem) -> Tensor:
    return rates(given.logits.double().log_softmax(-1), given.x_0, given.x_t, given.alpha)


def narrowed(given: Problem) -> Tensor:
    log_probs = given.logits.double().log_softmax(-1).to(given.logits.dtype)
    return rates(log_probs, given.x_0, given.x_t, given.alpha.float())


def in_float32(given: Problem) -> Tensor:
    return rates(given.logits.float().log_softmax(-1), given.x_0, given.x_t, given.alpha.float())


def fused(given: Problem) -> Tensor:
    return fused_nelbo(given.logits, given.x_0, given.x_t, given.alpha)


def crossed(given: Problem) -> Tensor:
    return cross_entropy(given.logits, given.x_0, reduction="none")


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "fused": fused,
    "float64": in_float64,
    "float64, narrowed": narrowed,
    "float32": in_float32,
    "cross-entropy": crossed,
}


def forward(form: Callable[[Problem], Tensor], given: Problem) -> Tensor:
    with torch.no_grad():
        return form(given)


def both_ways(form: Callable[[Problem], Tensor], given: Problem) -> tuple[Tensor, Tensor]:
    leaf = given.logits.detach().requires_grad_()
    value = form(given._replace(logits=leaf))
    return value.detach(), torch.autograd.grad(value.mean(), leaf)[0]


def keep_freed_memory() -> None:
    """Ask the GNU C library not to return memory; others are left as they are."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, -1)  # never


def peak_cpu_bytes(call: Callable[[], object]) -> int:
    """Most memory that PyTorch's CPU allocator has handed out during a call, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in allocations:
        held += change
        peak = max(peak, held)
    return peak


def errors(given: Problem) -> dict[str, dict[str, float]]:
    """Of value and gradient, by form."""
    exact, exact_gradient = both_ways(in_float64, given._replace(logits=given.logits.double()))
    found: dict[str, dict[str, float]] = {}
    for name in ("fused", "float64, narrowed", "float32"):
        value, gradient = both_ways(FORMS[name], given)
        distance = (gradient.double() - exact_gradient).norm(dim=1)
        found[name] = {
            "value": float((value.double() - exact).abs().max() / exact.mean()),
            "gradient": float((distance / exact_gradient.norm(dim=1)).max()),
        }
    return found


def measure(given: Problem, repeats: int) -> dict[str, Any]:
    """Everything about one size and dtype; prints it."""
    device = given.logits.device
    clock = comparable_clock(device)
    count = given.logits.numel()

    def timed(call: Callable[[Callable[[Problem], Tensor], Problem], object]) -> Comparison:
        calls = {name: (lambda form=form: call(form, given)) for name, form in FORMS.items()}
        return time_calls(calls, repeats=repeats, warmup=2, baseline="fused", device=device)

    timings = {"forward and backward": timed(both_ways), "forward": timed(forward)}
    kept = {
        name: saved_graph_bytes(lambda form=form: form(given._replace(logits=given.logits.detach().requires_grad_())))
        for name, form in FORMS.items()
    }
    peaks: dict[str, int] = {
        name: timings["forward and backward"].timings[name].peak_bytes
        or peak_cpu_bytes(lambda form=form: both_ways(form, given))
        for name, form in FORMS.items()
    }
    wrong = errors(given)
    print(f"\n{len(given.logits)} rows of {given.logits.shape[1]}, {given.logits.dtype}, {device}")
    for name in FORMS:
        for what, comparison in timings.items():
            milliseconds = 1000 * comparison.timings[name].seconds(clock).median
            ratio = comparison.ratio(name, clock=clock)
            print(f"  {name:18} {what:20} {milliseconds:8.1f} ms  {ratio!s:>24} times fused")
        error = ", ".join(f"{what} off by {size:.1e}" for what, size in wrong.get(name, {}).items())
        print(f"  {name:18} keeps {kept[name] / count:5.2f} bytes a logit, peak {peaks[name] / count:6.2f}; {error}")
    met = {
        "float64 over fused, forward and backward": timings["forward and backward"].ratio("float64", clock=clock).median
    }
    if given.logits.dtype == torch.bfloat16:
        met["bytes kept per bfloat16 logit"] = kept["fused"] / count
    for what, value in met.items():
        target = TARGETS[what]
        good = value >= target if "over" in what else value <= target
        print(f"  {what}: {value:.2f}, target {target:g}: {'met' if good else 'missed'}")
    return {
        "timings": {what: comparison.to_dict() for what, comparison in timings.items()},
        "clock": clock,
        "kept_bytes_per_logit": {name: size / count for name, size in kept.items()},
        "peak_bytes_per_logit": {name: size / count for name, size in peaks.items()},
        "errors": wrong,
        "summary": met,
    }


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    device = torch.device(chosen.device)
    if device.type == "cpu":
        keep_freed_memory()
    metrics: dict[str, Any] = {"targets": TARGETS}
    for rows in chosen.rows:
        for name in chosen.dtypes:
            given = problem(rows, chosen.vocab, getattr(torch, name), device, seed=0)
            metrics[f"{name}, {rows} rows"] = measure(given, chosen.repeats)
            served = nelbo_triton.serves(given.logits)
    kernels = "Triton" if served else "PyTorch"
    notes = [
        f"fused ran as {kernels} kernels",
        "bytes a logit of a peak are those beyond the logits themselves",
        "on a CPU: one thread, its CPU time, freed memory kept by the process",
    ]
    print(write_result("udm-loss", metrics, vars(chosen), seed=0, started=started, notes=notes))


if __name__ == "__main__":
    main()
