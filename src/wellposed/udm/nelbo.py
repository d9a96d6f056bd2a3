r"""The plug-in bound of uniform diffusion, fused: logits are fetched once forwards and once backwards, and not copied.

A token survives until t with probability alpha, otherwise it is uniform over the K tokens, itself included. Let p be
what a model says about the clean token, read as the leave-one-out posterior, and

    q(y) = alpha [y = x_0] + (1 - alpha) / K,        q^p(y) = alpha p(y) + (1 - alpha) / K

the law of the noisy token given x_0, and given p. The reverse process jumps from x_t to y at the rate ``q^p(y) /
q^p(x_t)`` times ``beta / K``, with ``beta = -alpha' / alpha``. Its bound on -log p(x_0) has the density in t per token

    beta * value,    value = { KL(q || q^p) + rho - 1 - log rho } / (K q(x_t)),    rho = q(x_t) / q^p(x_t).

Everything here is ``value``, in nats; the schedule's rate ``beta`` is the caller's factor. The integral over t of the
expected density is the entropy of the data if p is the exact leave-one-out posterior, and more for any other p, the
denoiser included (arXiv 2605.22765; this form of the bound is older, 2412.10193).

**What is summed.** With ``r = K alpha / (1 - alpha)``, ``w_y = r p_y``, ``D = 1 - alpha + K alpha``, ``phi(a) = e^a -
1 - a`` and ``delta = log q(x_0) / q^p(x_0)``,

    K^2 q(x_t) value = K phi(log rho) + D phi(-delta) + (1 - alpha) sum_{y != x_0} (w_y - log(1 + w_y)),

where every term is non-negative, so that no large numbers cancel, however good the model is. Two come from the whole
row, ``sum_{y != x_0} p_y`` and the last sum; the rest is arithmetic on a few float64 scalars per row.

**The gradient** in the logits, with ``s_y = w_y / (1 + w_y)``, ``Q = sum_{y != x_0} w_y s_y``, and m = 1 where x_0
differs from x_t, ``(1 - alpha) / D`` where it does not, is for every other token than x_0 and x_t

    K value'_y = p_y (m r s_y - H),

with one H per row; at x_0 it is again a sum of terms of one sign. The backward pass keeps the logits as they are (2
bytes each in bfloat16) and four scalars per row, and computes the probabilities again.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.udm import nelbo_triton
from wellposed.udm.prediction import per_position

__all__ = ["fused_nelbo", "nelbo_divergence_form", "nelbo_rate_form"]

CLOSEST_TO_ONE = 1e-12
"""Smallest 1 - alpha: there four digits of it are left in float64, and the products of two w still fit into float32."""

# Logits per chunk. On a CPU both buffers should stay in a thread's cache; elsewhere a chunk has to fill the device.
CPU_CHUNK = 2**19
DEVICE_CHUNK = 2**25


def fused_nelbo(
    logits: Float[Tensor, "*rows vocab"],
    x_0: Int[Tensor, "..."],
    x_t: Int[Tensor, "..."],
    alpha: Float[Tensor, "..."],
    *,
    kind: Literal["leave_one_out", "denoiser"] = "leave_one_out",
    chunk_rows: int | None = None,
) -> Float[Tensor, "*rows"]:
    r"""The plug-in bound of uniform diffusion per token, without the schedule's rate: >= 0, and 0 only where p is x_0.

    The density in t of the negative evidence lower bound is ``beta`` times this, with ``beta = -alpha'(t) / alpha(t)``.

    Rows are worked off in chunks that stay in the cache; no tensor of all rows and the vocabulary is made but the
    gradient, which has the logits' dtype. Half-precision and float32 logits are summed in float32 and end in float64
    scalars; float64 logits stay float64. Against float64 arithmetic on the same logits the relative error is below 4e-6
    (float32's exponential of numbers near -60; 1e-7 is usual), except for what rounding leaves of losses that are next
    to nothing: 1e-7 q / K where x_t is x_0, ``1e-7 q alpha / (1 - alpha)`` where it is not, for a p that misses x_0 by
    q. CUDA tensors go through Triton kernels where triton is installed.

    It is one opaque operator for ``torch.compile``, and has no second derivative.

    Args:
        logits: unnormalised; -inf is probability 0.
        x_0: clean tokens, of shape ``rows``.
        x_t: noisy tokens, likewise.
        alpha: survival probabilities, float64, in (0, 1), best on the CPU, where they are checked: one for all rows, or
            one for each entry of the leading axes, such as (batch,) for rows (batch, length).
        kind: what the logits are. A denoiser's become the leave-one-out posterior's, as by ``to_leave_one_out``, but
            without a copy of them.
        chunk_rows: rows per chunk; by default as many as fit the cache.

    Returns:
        float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes that do not belong together, an alpha outside (0, 1 - 1e-12) or not float64, a token outside
            the vocabulary (looked at on a CPU only), another kind, no rows in a chunk.
    """
    rows = logits.shape[:-1]
    if x_0.shape != rows or x_t.shape != rows:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} go with tokens of shape {tuple(rows)}; x_0 has {tuple(x_0.shape)}, "
            f"x_t has {tuple(x_t.shape)}"
        )
    if alpha.shape != rows[: alpha.ndim]:
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)}; rows of shape {tuple(rows)} take a single one, or one for each "
            f"entry of the leading axes, such as {tuple(rows[:1])}"
        )
    if alpha.dtype != torch.float64 or alpha.requires_grad:
        raise ValueError(
            f"alpha is {alpha.dtype}, requires_grad={alpha.requires_grad}; expected float64 without gradient, as "
            "schedules give it: float32 has lost 1 - alpha near the data"
        )
    if kind not in ("leave_one_out", "denoiser"):
        raise ValueError(f"kind is {kind!r}; write 'leave_one_out' or 'denoiser', or convert first")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; write None, or at least 1")
    per_row = alpha.reshape(alpha.shape + (1,) * (len(rows) - alpha.ndim)).expand(rows)
    # The first result is the loss, the other is for the backward pass.
    return _forward(
        logits.reshape(-1, logits.shape[-1]),
        x_0.reshape(-1).long(),
        x_t.reshape(-1).long(),
        per_row.reshape(-1),
        kind == "denoiser",
        chunk_rows,
    )[0].reshape(rows)


def nelbo_rate_form(
    log_probs: Float[Tensor, "*rows vocab"],
    x_0: Int[Tensor, "*rows"],
    x_t: Int[Tensor, "*rows"],
    alpha: Float[Tensor, "*batch"],
) -> Float[Tensor, "*rows"]:
    r"""``fused_nelbo`` by its definition: expected rates against actual ones, densely, for readers and tests.

    ``value = sum_y (b(y) log(b(y) / b^p(y)) + b^p(y) - b(y)) / K``, with the rates ``b(y) = q(y) / q(x_t)`` and
    ``b^p(y) = q^p(y) / q^p(x_t)`` of jumps to y: the divergence of one Poisson process from another.

    Args:
        log_probs: normalised; float64, or digits are lost to cancellation.
        x_0: clean tokens.
        x_t: noisy tokens.
        alpha: as for ``fused_nelbo``.
    """
    vocab_size = log_probs.shape[-1]
    clean, modelled = _noisy_laws(log_probs, x_0, alpha)
    here = x_t.unsqueeze(-1)
    rates, modelled_rates = clean / clean.gather(-1, here), modelled / modelled.gather(-1, here)
    return (rates * (rates / modelled_rates).log() + modelled_rates - rates).sum(-1) / vocab_size


def nelbo_divergence_form(
    log_probs: Float[Tensor, "*rows vocab"],
    x_0: Int[Tensor, "*rows"],
    x_t: Int[Tensor, "*rows"],
    alpha: Float[Tensor, "*batch"],
) -> Float[Tensor, "*rows"]:
    r"""The same by ``{KL(q || q^p) + rho - 1 - log rho} / (K q(x_t))``, with ``rho = q(x_t) / q^p(x_t)``.

    Each part is visibly non-negative, and zero if p is certain of x_0. Arguments as for ``nelbo_rate_form``.
    """
    clean, modelled = _noisy_laws(log_probs, x_0, alpha)
    here = x_t.unsqueeze(-1)
    observed = clean.gather(-1, here).squeeze(-1)
    rho = observed / modelled.gather(-1, here).squeeze(-1)
    divergence = (clean * (clean / modelled).log()).sum(-1)
    return (divergence + rho - 1 - rho.log()) / (log_probs.shape[-1] * observed)


def _noisy_laws(log_probs: Tensor, x_0: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """q and q^p."""
    vocab_size = log_probs.shape[-1]
    survival = per_position(alpha, x_0).unsqueeze(-1)
    certain = torch.nn.functional.one_hot(x_0, vocab_size)
    noise = (1 - survival) / vocab_size
    return survival * certain + noise, survival * log_probs.exp() + noise


# The row's scalars, float64 and one entry per row, in this order: probabilities of x_0 and x_t and the sum over all
# tokens but x_0, in the unit that the chunks were summed in; the sum of w - log(1 + w). Triton's kernels append theirs.
Statistics = Float[Tensor, "scalars n"]


@torch.library.custom_op(
    "wellposed::uniform_nelbo",
    mutates_args=(),
    schema="(Tensor logits, Tensor x_0, Tensor x_t, Tensor alpha, bool denoiser, int? chunk_rows) -> (Tensor, Tensor)",
)
def _forward(
    logits: Float[Tensor, "n vocab"],
    x_0: Int[Tensor, " n"],
    x_t: Int[Tensor, " n"],
    alpha: Float[Tensor, " n"],
    denoiser: bool,
    chunk_rows: int | None,
) -> tuple[Float[Tensor, " n"], Statistics]:
    _check_values(logits, x_0, x_t, alpha)
    vocab_size = logits.shape[-1]
    alpha = alpha.to(logits.device, non_blocking=True)
    ratio = _ratio(alpha, vocab_size)
    discount = _discount(ratio, denoiser)
    if nelbo_triton.serves(logits):
        statistics = nelbo_triton.row_statistics(logits, x_0, x_t, ratio, discount)
    else:
        statistics = _row_statistics(logits, x_0, x_t, ratio, discount, chunk_rows or _default_chunk_rows(logits))
    value = _value(statistics, alpha, x_0 == x_t, vocab_size)
    return value.to(_accumulation_dtype(logits)), statistics


@_forward.register_fake
def _(
    logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor, denoiser: bool, chunk_rows: int | None
) -> tuple[Float[Tensor, " n"], Statistics]:
    count = nelbo_triton.NUM_STATISTICS if nelbo_triton.serves(logits) else 4
    value = logits.new_empty(len(logits), dtype=_accumulation_dtype(logits))
    return value, logits.new_empty(count, len(logits), dtype=torch.float64)


@torch.library.custom_op(
    "wellposed::uniform_nelbo_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor logits, Tensor x_0, Tensor x_t, Tensor alpha, Tensor statistics, bool denoiser,"
    " int? chunk_rows) -> Tensor",
)
def _backward(
    upstream: Float[Tensor, " n"],
    logits: Float[Tensor, "n vocab"],
    x_0: Int[Tensor, " n"],
    x_t: Int[Tensor, " n"],
    alpha: Float[Tensor, " n"],
    statistics: Statistics,
    denoiser: bool,
    chunk_rows: int | None,
) -> Float[Tensor, "n vocab"]:
    vocab_size = logits.shape[-1]
    alpha = alpha.to(logits.device, non_blocking=True)
    ratio = _ratio(alpha, vocab_size)
    upstream = upstream.double() / vocab_size
    kept, seen, others = statistics[:3]
    total = kept + others
    p_0, miss, p_t = kept / total, others / total, seen / total
    w_0, w_t = ratio * p_0, ratio * p_t
    s_0, s_t = w_0 / (1 + w_0), w_t / (1 + w_t)
    same = x_0 == x_t
    # K d value / d u_y, for u_y = log w_y taken as free variables, is -m s_y, and besides: at x_0 where it is x_t, or
    # at x_t where it is not, what follows.
    m = torch.where(same, 1 / (1 + ratio), 1.0)
    at_both = torch.where(same, -s_0 * vocab_size / _weight(alpha, vocab_size) * ratio * miss / (1 + w_0), 0.0)
    at_x_t = torch.where(same, 0.0, vocab_size / (1 - alpha) * s_t.square())
    # H = m Q + rest, and Q is known only when the chunk has been summed.
    rest = at_both + at_x_t - m * ratio * s_0 * miss
    slope, offset, per_q = upstream * m * ratio / total, upstream * rest / total, upstream * m / total
    if nelbo_triton.serves(logits):
        curvature = nelbo_triton.curvature(statistics)
        gradient = nelbo_triton.gradient(logits, statistics, total / ratio, slope, offset + per_q * curvature)
    else:
        per_sum = per_q * ratio / total
        discount, chunk_rows = _discount(ratio, denoiser), chunk_rows or _default_chunk_rows(logits)
        gradient, curvature = _gradient(logits, x_0, x_t, discount, total / ratio, slope, offset, per_sum, chunk_rows)
        curvature = curvature * ratio / total
    # The two special tokens from scalars alone. x_0 last: where it is x_t, the other's formula does not hold.
    noisy = upstream * (p_t * (m * ratio * s_t - m * curvature - rest) + at_x_t)
    clean = upstream * (miss * (at_both - miss * m * ratio * s_0) - p_0 * (m * curvature + at_x_t))
    # (Not by scatter_, which on a CPU converts the whole of a half-precision tensor to float32 and back.)
    every = torch.arange(len(logits), device=logits.device)
    gradient[every, x_t] = noisy.to(gradient.dtype)
    gradient[every, x_0] = clean.to(gradient.dtype)
    return gradient


@_backward.register_fake
def _(
    upstream: Tensor,
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    statistics: Tensor,
    denoiser: bool,
    chunk_rows: int | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.denoiser, ctx.chunk_rows = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _first_derivative(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(upstream, *ctx.saved_tensors, ctx.denoiser, ctx.chunk_rows), *[None] * 5


def _no_second_derivative(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "fused_nelbo has no second derivative; differentiate nelbo_rate_form(logits.log_softmax(-1), ...) instead"
    )


_forward.register_autograd(_first_derivative, setup_context=_save)
_backward.register_autograd(_no_second_derivative)


def _check_values(logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor) -> None:
    """Where a look does not make the host wait for a device; there an index out of range fails loudly anyway."""
    vocab_size = logits.shape[-1]
    for name, tokens in (("x_0", x_0), ("x_t", x_t)):
        if tokens.device.type != "cpu" or not tokens.numel():
            continue
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), the vocabulary of the logits; got {low} to {high}")
    if alpha.device.type == "cpu" and not bool(((alpha > 0) & (1 - alpha > CLOSEST_TO_ONE)).all()):
        raise ValueError(
            f"alpha must lie in (0, 1 - {CLOSEST_TO_ONE:g}), got values in [{alpha.min().item()!r}, "
            f"{alpha.max().item()!r}]; at 1 nothing is noisy, and the density has no limit: draw t from 1e-3 on, say"
        )


def _default_chunk_rows(logits: Tensor) -> int:
    budget = CPU_CHUNK * torch.get_num_threads() if logits.device.type == "cpu" else DEVICE_CHUNK
    return max(1, budget // logits.shape[-1])


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _ratio(alpha: Tensor, vocab_size: int) -> Tensor:
    """r."""
    return vocab_size * alpha / (1 - alpha)


def _discount(ratio: Tensor, denoiser: bool) -> Tensor | None:
    """1 / R, by which a denoiser's probability of x_t is too large for the leave-one-out posterior."""
    return 1 / (1 + ratio) if denoiser else None


def _weight(alpha: Tensor, vocab_size: int) -> Tensor:
    """D = K q(x_0)."""
    return 1 - alpha + vocab_size * alpha


def _phi(a: Tensor) -> Tensor:
    """e^a - 1 - a, to full relative precision."""
    series = a.square() * (1 / 2 + a * (1 / 6 + a * (1 / 24 + a / 120)))
    return torch.where(a.abs() < 1e-3, series, torch.expm1(a) - a)


def _value(statistics: Statistics, alpha: Tensor, same: Tensor, vocab_size: int) -> Float[Tensor, " n"]:
    kept, seen, others, excess = statistics[:4]
    total = kept + others
    p_0, miss = kept / total, others / total
    ratio, weight = _ratio(alpha, vocab_size), _weight(alpha, vocab_size)
    # log q(x_0) / q^p(x_0) = log (1 + r) / (1 + r p_0), from whichever of p_0 and 1 - p_0 is small and has all digits.
    delta = torch.where(
        p_0 < 0.5, torch.log1p(ratio) - torch.log1p(ratio * p_0), -torch.log1p(-ratio / (1 + ratio) * miss)
    )
    log_rho = torch.where(same, delta, -torch.log1p(ratio * seen / total))
    observed = torch.where(same, weight, 1 - alpha)
    terms = vocab_size * _phi(log_rho) + weight * _phi(-delta) + (1 - alpha) * excess
    return terms / (vocab_size * observed)


def _row_statistics(
    logits: Float[Tensor, "n vocab"],
    x_0: Int[Tensor, " n"],
    x_t: Int[Tensor, " n"],
    ratio: Float[Tensor, " n"],
    discount: Float[Tensor, " n"] | None,
    chunk_rows: int,
) -> Statistics:
    count, vocab_size = logits.shape
    dtype = _accumulation_dtype(logits)
    special = torch.stack([x_0, x_t], dim=1)
    statistics = logits.new_empty(4, count, dtype=torch.float64)
    chunk_rows = max(1, min(chunk_rows, count))
    half = vocab_size // 2
    weights = logits.new_empty(chunk_rows, vocab_size, dtype=dtype)
    plain_sum, joint = logits.new_empty(2, chunk_rows, half, dtype=dtype)
    for start in range(0, count, chunk_rows):
        rows = slice(start, min(start + chunk_rows, count))
        size = rows.stop - start
        w, a, b = weights[:size], plain_sum[:size], joint[:size]
        _relative_probs(logits[rows], special[rows, 1:], None if discount is None else discount[rows], out=w)
        statistics[:2, rows] = w.gather(1, special[rows]).T
        w.scatter_(1, special[rows, :1], 0)
        # Not 1 minus something: the softmax's own sum is off by up to 5e-6, and a good model's miss is small.
        statistics[2, rows] = w.sum(1)
        w.mul_((ratio[rows] / (statistics[0, rows] + statistics[2, rows])).to(dtype).unsqueeze(1))
        # Two tokens share a logarithm, (1 + w)(1 + w') - 1 = w + w' + w w'; the difference is taken before the sum,
        # where it is exact, and not between sums whose rounding would drown it.
        low, high, odd = w[:, :half], w[:, half : 2 * half], w[:, 2 * half :]
        torch.add(low, high, out=a)
        torch.addcmul(a, low, high, out=b)
        a.sub_(b.log1p_())
        statistics[3, rows] = a.sum(1) + (odd - odd.log1p()).sum(1)
    return statistics


def _relative_probs(
    logits: Float[Tensor, "n vocab"],
    x_t: Int[Tensor, "n 1"],
    discount: Float[Tensor, " n"] | None,
    *,
    out: Float[Tensor, "n vocab"],
) -> None:
    """The leave-one-out posterior, up to a factor per row."""
    torch.softmax(logits, dim=1, dtype=out.dtype, out=out)
    if discount is not None:
        out.scatter_(1, x_t, out.gather(1, x_t) * discount.to(out.dtype).unsqueeze(1))


def _gradient(
    logits: Float[Tensor, "n vocab"],
    x_0: Int[Tensor, " n"],
    x_t: Int[Tensor, " n"],
    discount: Float[Tensor, " n"] | None,
    half_point: Float[Tensor, " n"],
    slope: Float[Tensor, " n"],
    offset: Float[Tensor, " n"],
    per_sum: Float[Tensor, " n"],
    chunk_rows: int,
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """``p_y (slope s_y - offset - per_sum sum_y p_y s_y)`` for y other than x_0, and that sum over them.

    ``s_y = p_y / (p_y + half_point)``, and p as the row statistics have it. (At x_t the caller knows better.)
    """
    count, vocab_size = logits.shape
    dtype = _accumulation_dtype(logits)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    curvature = torch.empty_like(offset)
    chunk_rows = max(1, min(chunk_rows, count))
    probs = logits.new_empty(chunk_rows, vocab_size, dtype=dtype)
    # Wide logits need no second buffer: what is computed can be computed in place.
    wide = None if logits.dtype == dtype else torch.empty_like(probs)
    for start in range(0, count, chunk_rows):
        rows = slice(start, min(start + chunk_rows, count))
        p = probs[: rows.stop - start]
        s = gradient[rows] if wide is None else wide[: rows.stop - start]
        _relative_probs(logits[rows], x_t[rows].unsqueeze(1), None if discount is None else discount[rows], out=p)
        p.scatter_(1, x_0[rows].unsqueeze(1), 0)
        torch.add(p, half_point[rows].to(dtype).unsqueeze(1), out=s)
        torch.div(p, s, out=s)
        curvature[rows] = torch.linalg.vecdot(p, s)
        shift = offset[rows] + per_sum[rows] * curvature[rows]
        s.mul_(slope[rows].to(dtype).unsqueeze(1)).sub_(shift.to(dtype).unsqueeze(1))
        s.mul_(p)
        if wide is not None:
            gradient[rows] = s
    return gradient, curvature
