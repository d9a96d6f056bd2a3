"""The Triton kernels against the PyTorch form: on a GPU, or in Triton's interpreter on a CPU.

The interpreter takes an environment with triton and ``TRITON_INTERPRET=1 pytest tests/udm/test_nelbo_triton.py``.
"""

import math
import os
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from wellposed.udm import nelbo, nelbo_triton
from wellposed.udm.nelbo import fused_nelbo

Kind = Literal["leave_one_out", "denoiser"]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = nelbo_triton.INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(not nelbo_triton.INSTALLED, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")


def problem(vocab: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, some forbidden and the rows of a wider head, x_0, x_t (equal in every other row), alpha."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(rows, vocab + 3, generator=generator)[:, :vocab]
    x_0 = torch.randint(vocab, (rows,), generator=generator)
    other = (x_0 + torch.randint(1, vocab, (rows,), generator=generator)) % vocab
    x_t = torch.where(torch.arange(rows) % 2 == 0, x_0, other)
    if vocab > 4:
        forbidden = torch.tensor([token for token in range(4) if token not in (int(x_0[1]), int(x_t[1]))][:1])
        logits[1, forbidden] = -math.inf
        logits[2, x_0[2]] = -math.inf
    alpha = torch.tensor([1e-3, 0.3, 0.6, 0.9, 0.99, 0.9999], dtype=torch.float64).repeat(rows // 6 + 1)[:rows]
    return logits, x_0, x_t, alpha


def value_and_gradient(
    logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor, kind: Kind = "leave_one_out"
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = fused_nelbo(leaf, x_0, x_t, alpha, kind=kind)
    upstream = torch.linspace(0.5, 2, len(value), dtype=torch.float64, device=value.device)
    return value.detach(), torch.autograd.grad((value * upstream).sum(), leaf)[0]


def assert_agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    value, gradient = found
    exact, exact_gradient = expected
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double().cpu(), exact, rtol=4e-6, atol=0)
    info = torch.finfo(dtype)
    # The interpreter cuts bfloat16 off where a device rounds to the nearest.
    rounding = info.eps if INTERPRETED else info.eps / 2
    allowed = rounding * exact_gradient.abs() + info.smallest_normal * info.eps
    allowed += 1e-5 * exact_gradient.norm(dim=-1, keepdim=True)
    assert bool(((gradient.double().cpu() - exact_gradient).abs() <= allowed).all())


@interpreted
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("vocab", [2, 15, 256, 4096, 4097, 9001])
def test_the_interpreted_kernels_agree_with_the_reference(
    vocab: int, kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, x_0, x_t, alpha = problem(vocab)
    logits = logits.to(dtype)
    expected = value_and_gradient(logits.double(), x_0, x_t, alpha, kind)
    monkeypatch.setattr(nelbo_triton, "serves", lambda _: True)
    assert_agree(value_and_gradient(logits, x_0, x_t, alpha, kind), expected, dtype)


@interpreted
def test_the_interpreted_kernels_take_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nelbo_triton, "serves", lambda _: True)
    value, gradient = value_and_gradient(*(part[:0] for part in problem(5)))
    assert value.shape == (0,) and gradient.shape == (0, 5)


@interpreted
@pytest.mark.parametrize("vocab", [256, 9001])
def test_the_interpreted_sums_are_those_of_the_reference(vocab: int) -> None:
    logits, x_0, x_t, alpha = problem(vocab)
    ratio = vocab * alpha / (1 - alpha)
    found = nelbo_triton.row_statistics(logits, x_0, x_t, ratio, None)
    probs = logits.double().softmax(-1)
    weights = (ratio.unsqueeze(1) * probs).scatter(1, x_0.unsqueeze(1), 0)
    total = found[0] + found[2]
    parts = [probs.gather(1, tokens.unsqueeze(1)).squeeze(1) for tokens in (x_0, x_t)]
    for found_part, part in zip((found[0] / total, found[1] / total), parts, strict=True):
        torch.testing.assert_close(found_part, part, rtol=2e-6, atol=0)
    torch.testing.assert_close(found[3], (weights - weights.log1p()).sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(nelbo_triton.curvature(found), (weights**2 / (1 + weights)).sum(1), rtol=2e-6, atol=0)
    assert torch.equal(found[5], logits.amax(1).double())


@needs_triton
def test_serves_what_the_kernels_can() -> None:
    with torch.device("meta"):
        assert not nelbo_triton.serves(torch.empty(2, 3))
    assert not nelbo_triton.serves(torch.empty(2, 3))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("vocab", [2, 15, 256, 4096, 4097, 50257])
def test_the_kernels_agree_with_the_reference(vocab: int, kind: Kind, dtype: torch.dtype) -> None:
    logits, x_0, x_t, alpha = problem(vocab, rows=60)
    logits = logits.to(dtype)
    expected = value_and_gradient(logits.double(), x_0, x_t, alpha, kind)
    on_device = (part.cuda() for part in (logits, x_0, x_t))
    assert nelbo_triton.serves(logits.cuda())
    assert_agree(value_and_gradient(*on_device, alpha, kind), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_the_torch_form_runs_on_a_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where triton is missing, and for float64 in any case."""
    monkeypatch.setattr(nelbo_triton, "serves", lambda _: False)
    monkeypatch.setattr(nelbo, "DEVICE_CHUNK", 4 * 1000)
    logits, x_0, x_t, alpha = problem(1000, rows=18)
    logits = logits.to(dtype)
    expected = value_and_gradient(logits.double(), x_0, x_t, alpha)
    value, gradient = value_and_gradient(*(part.cuda() for part in (logits, x_0, x_t)), alpha)
    assert_agree((value.float(), gradient), expected, dtype)


@pytest.mark.gpu
@needs_triton
def test_the_kernels_keep_the_logits_and_make_the_gradient_only() -> None:
    logits, x_0, x_t, alpha = problem(50257, rows=128)
    logits, x_0, x_t = logits.to("cuda", torch.bfloat16).contiguous().requires_grad_(), x_0.cuda(), x_t.cuda()
    fused_nelbo(logits, x_0, x_t, alpha).sum().backward()
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_nelbo(logits, x_0, x_t, alpha).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.1 * logits.numel() * logits.element_size()
