r"""Triton kernels behind ``fused_nelbo`` on CUDA devices; ``nelbo`` has the formulas and is the reference.

One program sweeps a row twice (probabilities with a running maximum; then the sums that need the normaliser), the
second time out of the device's cache. The gradient is one more pass; ``nelbo`` adds its scalars and two special tokens.

Checked with Triton 3.9 and no GPU: in Triton's interpreter the results, masks and strides, against the reference; and
that the kernels compile for compute capability 9.0 in each dtype, without spilled registers. Not checked: results on a
device, which the tests marked ``gpu`` are for, and the speed, so that block size and warps are only sensible guesses.
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["NUM_STATISTICS", "curvature", "gradient", "row_statistics", "serves"]

NUM_STATISTICS = 6

# No dependency: PyTorch's CUDA builds bring it along, those for a CPU do not.
INSTALLED = find_spec("triton") is not None
triton: Any = import_module("triton") if INSTALLED else None
tl: Any = import_module("triton.language") if INSTALLED else SimpleNamespace(constexpr=int)
LARGEST_BLOCK = 4096


def serves(logits: Tensor) -> bool:
    """Whether these logits go through the kernels."""
    return INSTALLED and logits.is_cuda and logits.dtype in (torch.float16, torch.bfloat16, torch.float32)


def row_statistics(
    logits: Float[Tensor, "n vocab"],
    x_0: Int[Tensor, " n"],
    x_t: Int[Tensor, " n"],
    ratio: Float[Tensor, " n"],
    discount: Float[Tensor, " n"] | None,
) -> Float[Tensor, "scalars n"]:
    """What ``nelbo`` needs of each row: probabilities of x_0, of x_t and of all tokens but x_0, relative to the most
    probable one; sums over all but x_0 of ``w - log(1 + w)`` and of ``w^2 / (1 + w)``; the largest logit.

    Args:
        logits: in float32 at most.
        x_0: clean tokens.
        x_t: noisy tokens.
        ratio: w over the probability, float64.
        discount: a factor on the probability of x_t; None is 1.
    """
    count, vocab_size = logits.shape
    logits = _with_dense_rows(logits)
    tokens = torch.stack([x_0, x_t], dim=1)
    special = logits.gather(1, tokens).float()
    scalars = torch.stack([ratio, torch.ones_like(ratio) if discount is None else discount]).float()
    sums = logits.new_empty(4, count, dtype=torch.float32)
    if count:
        with torch.cuda.device_of(logits):
            _STATISTICS[(count,)](
                logits, logits.stride(0), tokens, special, scalars, sums, count, vocab_size, **_launch(vocab_size)
            )
    *parts, peak = sums
    kept, seen = (special - peak.unsqueeze(1)).exp().T
    if discount is not None:
        kept, seen = kept * torch.where(x_0 == x_t, scalars[1], 1), seen * scalars[1]
    return torch.stack([kept, seen, *parts, peak]).double()


def curvature(statistics: Float[Tensor, "scalars n"]) -> Float[Tensor, " n"]:
    """The sum of ``w^2 / (1 + w)``."""
    return statistics[4]


def gradient(
    logits: Float[Tensor, "n vocab"],
    statistics: Float[Tensor, "scalars n"],
    half_point: Float[Tensor, " n"],
    slope: Float[Tensor, " n"],
    shift: Float[Tensor, " n"],
) -> Float[Tensor, "n vocab"]:
    """``p_y (slope p_y / (p_y + half_point) - shift)``, p relative to the most probable token, in the logits' dtype."""
    count, vocab_size = logits.shape
    logits = _with_dense_rows(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scalars = torch.stack([statistics[5], half_point, slope, shift]).float()
    if count:
        launch = _launch(vocab_size)
        blocks = triton.cdiv(vocab_size, launch["BLOCK"])
        with torch.cuda.device_of(logits):
            _GRADIENT[(count, blocks)](logits, logits.stride(0), out, scalars, count, vocab_size, **launch)
    return out


def _with_dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch(vocab_size: int) -> dict[str, Any]:
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocab_size))
    # Fused multiply-adds are named because Triton is about to change its default, and warns until one chooses.
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256)), "enable_fp_fusion": True}


# Triton reads the source: it would look other annotations up, and find none of their names.
def _sweep(
    logits,  # noqa: ANN001
    stride,  # noqa: ANN001
    tokens,  # noqa: ANN001
    special,  # noqa: ANN001
    scalars,  # noqa: ANN001
    sums,  # noqa: ANN001
    count,  # noqa: ANN001
    vocab_size,  # noqa: ANN001
    BLOCK: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * stride
    clean = tl.load(tokens + 2 * row)
    noisy = tl.load(tokens + 2 * row + 1)
    clean_logit = tl.load(special + 2 * row)
    discount = tl.load(scalars + count + row)
    lanes = tl.arange(0, BLOCK)
    # Not -inf, from which -inf could not be subtracted.
    peak = tl.maximum(clean_logit, -3.0e38)
    others = 0.0
    for start in range(0, vocab_size, BLOCK):
        token = start + lanes
        chosen = (token < vocab_size) & (token != clean)
        z = tl.load(own + token, mask=chosen, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        p = tl.exp(z - higher) * tl.where(token == noisy, discount, 1.0)
        others = others * tl.exp(peak - higher) + tl.sum(p, 0)
        peak = higher
    scale = tl.load(scalars + row) / (others + tl.exp(clean_logit - peak) * tl.where(clean == noisy, discount, 1.0))
    excess = tl.zeros([BLOCK], dtype=tl.float32)
    curved = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + lanes
        chosen = (token < vocab_size) & (token != clean)
        z = tl.load(own + token, mask=chosen, other=float("-inf")).to(tl.float32)
        w = tl.exp(z - peak) * tl.where(token == noisy, discount, 1.0) * scale
        # log(1 + w) = 2 artanh s: below 1/2 its series leaves w - log(1 + w) all digits.
        s = w / (2 + w)
        square = s * s
        series = w * s - 2 * s * square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
        excess += tl.where(w < 0.5, series, w - tl.log(1 + w))
        curved += w * (w / (1 + w))
    tl.store(sums + row, others)
    tl.store(sums + count + row, tl.sum(excess, 0))
    tl.store(sums + 2 * count + row, tl.sum(curved, 0))
    tl.store(sums + 3 * count + row, peak)


def _differentiate(
    logits,  # noqa: ANN001
    stride,  # noqa: ANN001
    out,  # noqa: ANN001
    scalars,  # noqa: ANN001
    count,  # noqa: ANN001
    vocab_size,  # noqa: ANN001
    BLOCK: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    peak = tl.load(scalars + row)
    half_point = tl.load(scalars + count + row)
    slope = tl.load(scalars + 2 * count + row)
    shift = tl.load(scalars + 3 * count + row)
    z = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - peak)
    entries = p * (slope * (p / (p + half_point)) - shift)
    tl.store(out + row.to(tl.int64) * vocab_size + token, entries.to(out.dtype.element_ty), mask=inside)


# Unwrapped, because the test run wraps annotated functions in checks that Triton cannot compile.
_STATISTICS: Any = triton.jit(inspect.unwrap(_sweep)) if INSTALLED else None
_GRADIENT: Any = triton.jit(inspect.unwrap(_differentiate)) if INSTALLED else None
