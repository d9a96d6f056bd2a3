"""The plug-in bound: its three forms, what it is the limit of, who minimises it; the fused form's digits and bytes."""

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from wellposed.evaluation.speed import saved_graph_bytes
from wellposed.udm.nelbo import fused_nelbo, nelbo_divergence_form, nelbo_rate_form
from wellposed.udm.prediction import to_denoiser, to_leave_one_out

HALF = (torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int, vocab: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x_0, and x_t equal to it in every other row."""
    draw = generator(seed)
    x_0 = torch.randint(vocab, (rows,), generator=draw)
    other = (x_0 + torch.randint(1, vocab, (rows,), generator=draw)) % vocab
    return x_0, torch.where(torch.arange(rows) % 2 == 0, x_0, other)


def logits_of(rows: int, vocab: int, scale: float = 3.0, seed: int = 2) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=generator(seed), dtype=torch.float64)


def alphas(rows: int, low: float = 0.02, high: float = 0.98) -> Tensor:
    return low + (high - low) * torch.rand(rows, generator=generator(3), dtype=torch.float64)


def reference(logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by float64 autograd of the definition, on the very numbers in ``logits``."""
    exact = logits.detach().double().requires_grad_()
    value = nelbo_rate_form(exact.log_softmax(-1), x_0, x_t, alpha)
    return value.detach(), torch.autograd.grad((value * upstream).sum(), exact)[0]


def value_and_gradient(
    logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor, upstream: Tensor | float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = fused_nelbo(leaf, x_0, x_t, alpha, **options)
    return value.detach(), torch.autograd.grad((value * upstream).sum(), leaf)[0]


def left_over(logits: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor) -> Tensor:
    """What float32 rounding may leave of a loss that vanishes with the model's miss."""
    missed = 1 - logits.double().softmax(-1).gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
    return 1e-7 * missed * torch.where(x_0 == x_t, 1 / logits.shape[-1], alpha / (1 - alpha))


def row_error(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("vocab", [2, 3, 5, 64])
def test_three_forms_agree(vocab: int) -> None:
    logits, (x_0, x_t), alpha = logits_of(40, vocab, scale=1.0), tokens(40, vocab), alphas(40)
    log_probs = logits.log_softmax(-1)
    rate, divergence = (form(log_probs, x_0, x_t, alpha) for form in (nelbo_rate_form, nelbo_divergence_form))
    torch.testing.assert_close(divergence, rate, rtol=1e-9, atol=0)
    torch.testing.assert_close(fused_nelbo(logits, x_0, x_t, alpha), rate, rtol=1e-9, atol=0)


def noising(survival: Tensor, vocab: int) -> Tensor:
    """[from, to]."""
    return survival * torch.eye(vocab, dtype=torch.float64) + (1 - survival) / vocab


def reverse_law(prior: Tensor, alpha_s: Tensor, alpha_t: Tensor, x_t: int) -> Tensor:
    """p(x_s | x_t) of the chain started from ``prior``."""
    vocab = len(prior)
    joint = (prior @ noising(alpha_s, vocab)) * noising(alpha_t / alpha_s, vocab)[:, x_t]
    return joint / joint.sum()


@pytest.mark.parametrize("x_t", [1, 3])
def test_it_is_the_rate_of_the_divergence_of_a_small_step(x_t: int) -> None:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) / (t - s) tends to beta times the value, for alpha = 1 - t."""
    vocab, x_0, t, step = 5, 1, torch.tensor(0.6, dtype=torch.float64), 1e-5
    probs = logits_of(1, vocab, scale=1.0).softmax(-1)[0]
    certain = torch.nn.functional.one_hot(torch.tensor(x_0), vocab).double()
    actual, modelled = (reverse_law(prior, 1 - t + step, 1 - t, x_t) for prior in (certain, probs))
    divergence = float((actual * (actual / modelled).log()).sum()) / step
    value = fused_nelbo(probs.log(), torch.tensor(x_0), torch.tensor(x_t), 1 - t)
    assert float(value / (1 - t)) == pytest.approx(divergence, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_expected_over_clean_tokens_it_is_least_at_the_leave_one_out_posterior(alpha: float) -> None:
    vocab, x_t = 4, 2
    survival = torch.tensor(alpha, dtype=torch.float64)
    loo = logits_of(1, vocab, scale=1.0).softmax(-1)[0]
    denoiser = loo * noising(survival, vocab)[:, x_t]
    denoiser = denoiser / denoiser.sum()

    def expected(logits: Tensor) -> Tensor:
        """Of (n, K) candidates, over x_0 given x_t."""
        rows = logits.unsqueeze(1).expand(-1, vocab, -1)
        every = torch.arange(vocab).expand(len(logits), -1)
        return fused_nelbo(rows, every, torch.full_like(every, x_t), survival) @ denoiser

    best = loo.log().unsqueeze(0).requires_grad_()
    (gradient,) = torch.autograd.grad(expected(best).sum(), best)
    assert gradient.abs().max() <= 1e-13
    least = float(expected(best.detach()))
    others = 2 * torch.randn(2000, vocab, generator=generator(), dtype=torch.float64)
    assert float(expected(others).min()) > least
    assert float(expected(denoiser.log().unsqueeze(0))) > least * 1.01


@pytest.mark.parametrize("vocab", [2, 5, 130])
def test_gradient_is_that_of_the_definition(vocab: int) -> None:
    """Also for unequal upstream gradients, and where a chunk ends inside the rows."""
    logits, (x_0, x_t), alpha = logits_of(11, vocab), tokens(11, vocab), alphas(11, 1e-3, 0.9999)
    upstream = alphas(11)
    value, gradient = reference(logits, x_0, x_t, alpha, upstream)
    for chunk in (1, 4, 11, 50):
        found, found_gradient = value_and_gradient(logits, x_0, x_t, alpha, upstream, chunk_rows=chunk)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-15)
        assert row_error(found_gradient, gradient) <= 1e-9
        assert found_gradient.sum(-1).abs().max() <= 1e-12 * float(gradient.abs().max())


def test_gradient_is_that_of_finite_differences() -> None:
    logits, (x_0, x_t), alpha = logits_of(6, 5, scale=1.0), tokens(6, 5), alphas(6)
    assert torch.autograd.gradcheck(lambda z: fused_nelbo(z, x_0, x_t, alpha, chunk_rows=4), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("alpha", [1e-3, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("vocab", [2, 27, 1024, 50257])
def test_narrow_logits_keep_the_digits_they_have(vocab: int, alpha: float, dtype: torch.dtype) -> None:
    """Against float64 autograd of the definition on the same logits: float32 sums, and a gradient rounded once."""
    rows = 6 if vocab > 10_000 else 60
    logits, (x_0, x_t) = logits_of(rows, vocab).to(dtype), tokens(rows, vocab)
    survival = torch.tensor(alpha, dtype=torch.float64)
    # A loss scale, as float16 takes one.
    upstream = torch.full((rows,), 1e4 if dtype == torch.float16 and alpha < 0.5 else 1.0, dtype=torch.float64)
    value, gradient = reference(logits, x_0, x_t, survival, upstream)
    found, found_gradient = value_and_gradient(logits, x_0, x_t, survival, upstream)
    assert found.dtype == torch.float32 and found_gradient.dtype == dtype
    assert bool(((found - value).abs() <= 4e-6 * value + left_over(logits, x_0, x_t, survival)).all())
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * gradient.abs() + info.smallest_normal * info.eps
    assert bool(((found_gradient - gradient).abs() <= rounding + 1e-5 * gradient.norm(dim=-1, keepdim=True)).all())
    if dtype != torch.float16:  # whose small entries are subnormal
        assert row_error(found_gradient, gradient) <= info.eps / 2 + 1e-5


@pytest.mark.parametrize("miss", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("vocab", [30, 50257])
def test_a_good_model_has_an_accurate_small_loss(vocab: int, miss: float) -> None:
    """Where p_0 = 1 - miss and x_t = x_0 the loss is of order miss^2, which float32 sums of rates would lose."""
    rows = 4
    logits, (x_0, _) = logits_of(rows, vocab, scale=1.0).float(), tokens(rows, vocab)
    rest = logits.double().scatter(1, x_0.unsqueeze(1), -math.inf).logsumexp(1)
    logits.scatter_(1, x_0.unsqueeze(1), (rest + math.log1p(-miss) - math.log(miss)).float().unsqueeze(1))
    alpha = torch.tensor(0.5, dtype=torch.float64)
    value, gradient = value_and_gradient(logits, x_0, x_0, alpha)
    exact, exact_gradient = value_and_gradient(logits.double(), x_0, x_0, alpha)
    assert bool((exact > 0).all()) and float(exact.max()) < 5 * miss**2
    assert float((value - exact).abs().max()) <= 1e-7 * miss / vocab + 1e-6 * float(exact.max())
    assert row_error(gradient, exact_gradient) <= 5e-6


def test_it_vanishes_with_the_square_of_what_the_model_misses() -> None:
    """To leading order, where x_t = x_0: log ratios of q and q^p at x_0 and at x_t, and of the others, squared."""
    vocab, miss, alpha = 1000, 1e-12, 0.01
    rest = logits_of(1, vocab, scale=1.0)[0].index_fill(0, torch.tensor(3), -math.inf).softmax(0)
    logits = (miss * rest).log().index_fill(0, torch.tensor(3), math.log1p(-miss))
    same, survival = torch.tensor(3), torch.tensor(alpha, dtype=torch.float64)
    own, weight = vocab * alpha * miss / (1 - alpha + vocab * alpha), 1 - alpha + vocab * alpha
    others = (vocab * alpha / (1 - alpha) * miss * rest).square().sum()
    expected = ((vocab + weight) * own**2 + (1 - alpha) * others) / (2 * vocab * weight)
    torch.testing.assert_close(fused_nelbo(logits, same, same, survival), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_never_negative_and_zero_where_the_model_is_certain_and_right(dtype: torch.dtype) -> None:
    vocab, rows = 7, 200
    logits, (x_0, x_t), alpha = logits_of(rows, vocab, scale=30.0).to(dtype), tokens(rows, vocab), alphas(rows, 1e-4)
    assert bool((fused_nelbo(logits, x_0, x_t, alpha) >= 0).all())
    certain = torch.full((rows, vocab), -math.inf, dtype=dtype).scatter_(1, x_0.unsqueeze(1), 1.5)
    value, gradient = value_and_gradient(certain, x_0, x_t, alpha)
    assert not value.any() and not gradient.any()


def test_a_forbidden_token_has_no_gradient_and_the_others_do_not_see_it() -> None:
    logits, (x_0, x_t), alpha = logits_of(8, 6), tokens(8, 5), alphas(8)
    logits[:, 5] = -math.inf
    value, gradient = reference(logits, x_0, x_t, alpha, torch.ones(8))
    found, found_gradient = value_and_gradient(logits, x_0, x_t, alpha)
    torch.testing.assert_close(found, value, rtol=1e-10, atol=0)
    assert not found_gradient[:, 5].any()
    torch.testing.assert_close(found_gradient[:, :5], gradient[:, :5], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1 - 1e-8, 1 - 2e-12])
def test_at_the_ends_of_alpha(alpha: float, dtype: torch.dtype) -> None:
    """No overflow: e^rho reaches 5e16 there, whose square does not fit into float32."""
    logits, (x_0, x_t) = logits_of(4, 50257).to(dtype), tokens(4, 50257)
    survival = torch.tensor(alpha, dtype=torch.float64)
    value, gradient = value_and_gradient(logits, x_0, x_t, survival)
    exact, _ = value_and_gradient(logits.double(), x_0, x_t, survival)
    assert bool(gradient.isfinite().all())
    assert bool(((value - exact).abs() <= 1e-5 * exact + left_over(logits, x_0, x_t, survival)).all())


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 0.9999])
@pytest.mark.parametrize("vocab", [2, 200])
def test_a_denoiser_is_converted_on_the_way(vocab: int, alpha: float) -> None:
    logits, (x_0, x_t), upstream = logits_of(12, vocab), tokens(12, vocab), alphas(12)
    survival = torch.full((12,), alpha, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    value = nelbo_rate_form(to_leave_one_out(leaf, x_t, survival).log_softmax(-1), x_0, x_t, survival)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), leaf)
    found, found_gradient = value_and_gradient(logits, x_0, x_t, survival, upstream, kind="denoiser", chunk_rows=5)
    torch.testing.assert_close(found, value.detach(), rtol=1e-8, atol=1e-15)
    assert row_error(found_gradient, gradient) <= 1e-8
    # And in float32 the denoiser of a leave-one-out posterior loses no more digits than that itself.
    narrow = to_denoiser(logits, x_t, survival).float()
    exact = fused_nelbo(to_leave_one_out(narrow.double(), x_t, survival), x_0, x_t, survival)
    allowed = 4e-6 * exact + left_over(to_leave_one_out(narrow.double(), x_t, survival), x_0, x_t, survival)
    assert bool(((fused_nelbo(narrow, x_0, x_t, survival, kind="denoiser") - exact).abs() <= allowed).all())


def test_renaming_the_tokens_changes_nothing() -> None:
    logits, (x_0, x_t), alpha = logits_of(9, 33), tokens(9, 33), alphas(9)
    renamed = torch.randperm(33, generator=generator())
    value, gradient = value_and_gradient(logits, x_0, x_t, alpha)
    other, other_gradient = value_and_gradient(logits[:, renamed.argsort()], renamed[x_0], renamed[x_t], alpha)
    torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_gradient[:, renamed], gradient, rtol=1e-9, atol=1e-14)


def test_shapes_of_rows_and_alpha() -> None:
    batch, length, vocab = 3, 4, 6
    logits, (x_0, x_t), alpha = logits_of(batch * length, vocab), tokens(batch * length, vocab), alphas(batch)
    flat = fused_nelbo(logits, x_0, x_t, alpha.repeat_interleave(length))
    shaped = [part.reshape(batch, length, *part.shape[1:]) for part in (logits, x_0, x_t)]
    assert torch.equal(fused_nelbo(*shaped, alpha), flat.reshape(batch, length))
    assert torch.equal(fused_nelbo(*shaped, alpha.repeat_interleave(length).reshape(batch, length)).flatten(), flat)
    single = fused_nelbo(logits[0], x_0[0].int(), x_t[0].int(), alpha[0])
    assert single.shape == () and torch.equal(single, flat[0])
    assert fused_nelbo(logits[:0], x_0[:0], x_t[:0], alpha[:0]).shape == (0,)


def test_columns_of_a_wider_head_and_transposed_logits() -> None:
    wide, (x_0, x_t), alpha = logits_of(10, 8), tokens(10, 6), alphas(10)
    expected = value_and_gradient(wide[:, :6].clone(), x_0, x_t, alpha)
    leaf = wide.clone().requires_grad_()
    value = fused_nelbo(leaf[:, :6], x_0, x_t, alpha)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), expected[0])
    assert leaf.grad is not None and not leaf.grad[:, 6:].any()
    torch.testing.assert_close(leaf.grad[:, :6], expected[1])
    torch.testing.assert_close(fused_nelbo(wide[:, :6].T.contiguous().T, x_0, x_t, alpha), expected[0])


@pytest.mark.parametrize("dtype", HALF)
def test_keeps_two_bytes_a_logit_for_the_backward_pass(dtype: torch.dtype) -> None:
    rows, vocab = 32, 5000
    logits, (x_0, x_t), alpha = logits_of(rows, vocab).to(dtype).requires_grad_(), tokens(rows, vocab), alphas(rows)
    kept = saved_graph_bytes(lambda: fused_nelbo(logits, x_0, x_t, alpha))
    assert 2 <= kept / logits.numel() <= 2.05
    assert saved_graph_bytes(lambda: fused_nelbo(logits, x_0, x_t, alpha), exclude=[logits]) <= 100 * rows


def test_backward_twice_and_no_second_derivative() -> None:
    logits, (x_0, x_t), alpha = logits_of(4, 5).requires_grad_(), tokens(4, 5), alphas(4)
    loss = fused_nelbo(logits, x_0, x_t, alpha).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


def test_refuses_what_does_not_fit() -> None:
    logits, (x_0, x_t), alpha = logits_of(6, 5), tokens(6, 5), alphas(6)
    with pytest.raises(ValueError, match=r"x_t has \(5,\)"):
        fused_nelbo(logits, x_0, x_t[:5], alpha)
    with pytest.raises(ValueError, match="alpha has shape"):
        fused_nelbo(logits.reshape(2, 3, 5), x_0.reshape(2, 3), x_t.reshape(2, 3), alpha)
    with pytest.raises(ValueError, match="float64"):
        fused_nelbo(logits, x_0, x_t, alpha.float())
    with pytest.raises(ValueError, match="requires_grad=True"):
        fused_nelbo(logits, x_0, x_t, alpha.clone().requires_grad_())
    with pytest.raises(Exception, match="kind"):  # a ValueError, or a TypeCheckError where annotations are checked
        fused_nelbo(logits, x_0, x_t, alpha, kind="score")
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        fused_nelbo(logits, x_0, x_t, alpha, chunk_rows=0)
    for bad in (0.0, 1.0, 1 - 1e-13, -0.1, math.nan):
        with pytest.raises(ValueError, match="alpha must lie in"):
            fused_nelbo(logits, x_0, x_t, torch.tensor(bad, dtype=torch.float64))
    for name, bad in (("x_0", 5), ("x_0", -1), ("x_t", 5)):
        wrong = {"x_0": x_0.clone(), "x_t": x_t.clone()}
        wrong[name][2] = bad
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            fused_nelbo(logits, **wrong, alpha=alpha)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    logits, (x_0, x_t), alpha = logits_of(6, 40).float(), tokens(6, 40), alphas(6)

    def loss(z: Tensor) -> Tensor:
        return (fused_nelbo(2 * z, x_0, x_t, alpha) * alpha.float()).mean()

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    torch._dynamo.reset()
    for function, leaf in zip((loss, torch.compile(loss, fullgraph=True, backend=backend)), leaves, strict=True):
        function(leaf).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_operators_say_what_they_do() -> None:
    """PyTorch's own check: schema, shapes without data, registration of the gradient, tracing."""
    logits, (x_0, x_t), alpha = logits_of(6, 9).requires_grad_(), tokens(6, 9), alphas(6)
    results = torch.library.opcheck(torch.ops.wellposed.uniform_nelbo.default, (logits, x_0, x_t, alpha, True, 4))
    assert set(results.values()) == {"SUCCESS"}
