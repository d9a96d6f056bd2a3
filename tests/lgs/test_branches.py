"""Reading a mixture's weights off its numbers, and multiplying by the mixture's Jacobian."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wellposed.lgs.branches import NetworkCalls
from wellposed.lgs.jacobian import Linearization, ProductMethod, linearize


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(condition: Tensor) -> Callable[[Tensor], Tensor]:
    """Mixes channels and pixels within a sample, differently under each sample's condition."""

    def forward(x: Tensor) -> Tensor:
        return torch.sin(x * condition) + 0.3 * x.roll(1, dims=-1) * x.roll(1, dims=1)

    return forward


def conditions(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype).reshape(-1, 1, 1, 1)


def jacobian_transposed_times(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, v)[0]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 3.5, 7.5, 0.0, -2.0])
def test_guidance_on_a_doubled_batch(batch: int, scale: float) -> None:
    x, v = normal(batch, 3, 4, 4, seed=1), normal(batch, 3, 4, 4, seed=2)
    condition = torch.cat([conditions(*[0.5] * batch), conditions(*range(1, batch + 1))])

    def guided(x: Tensor) -> Tensor:
        uncond, cond = network(condition)(torch.cat([x, x])).chunk(2)
        return uncond + scale * (cond - uncond)

    calls = NetworkCalls()
    calls.add(linearize(network(condition), torch.cat([x, x])))
    linear, copies = calls.take(guided(x))
    assert copies == 1 and torch.equal(linear.output, guided(x))
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(guided, x, v), rtol=1e-8, atol=1e-8)


def test_three_branches_in_one_batch_and_one_call_after_the_other() -> None:
    x, v = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    weights = (-1.5, 1.0, 1.5)
    branches = [network(conditions(c, c + 1)) for c in (0.2, 1.0, 2.0)]

    def mixed(x: Tensor) -> Tensor:
        return sum(w * branch(x) for w, branch in zip(weights, branches, strict=True))

    expected = jacobian_transposed_times(mixed, x, v)
    one, many = NetworkCalls(), NetworkCalls()
    one.add(linearize(network(conditions(0.2, 1.2, 1.0, 2.0, 2.0, 3.0)), torch.cat([x] * 3)))
    for branch in branches:
        many.add(linearize(branch, x))
    for calls in (one, many):
        linear, copies = calls.take(mixed(x))
        assert copies == 1
        torch.testing.assert_close(linear.product(v), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pipeline_that_steps_both_halves(batch: int) -> None:
    """DiT's way: both halves of the batch are the guided mixture, the extra channels are dropped before."""
    x, v = normal(batch, 3, 4, 4, seed=1), normal(batch, 3, 4, 4, seed=2)
    condition = torch.cat([conditions(*range(1, batch + 1)), conditions(*[0.5] * batch)])

    def widened(x: Tensor) -> Tensor:
        return torch.cat([network(condition)(x), x**2], dim=1)

    def guided(x: Tensor) -> Tensor:
        cond, uncond = network(condition)(torch.cat([x, x])).chunk(2)
        return uncond + 4 * (cond - uncond)

    calls = NetworkCalls()
    calls.add(linearize(widened, torch.cat([x, x])))
    linear, copies = calls.take(torch.cat([guided(x)] * 2))
    assert copies == 2 and linear.output.shape == x.shape
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(guided, x, v), rtol=1e-8, atol=1e-8)


def test_an_unguided_batch_is_never_taken_for_a_doubled_one() -> None:
    twins = normal(1, 3, 4, 4, seed=1).repeat(2, 1, 1, 1)  # two equal images, as with equal latents
    function = network(conditions(1.0, 1.0))
    calls = NetworkCalls()
    calls.add(linearize(function, twins))
    linear, copies = calls.take(function(twins))
    assert copies == 1 and linear.output.shape == twins.shape
    v = normal(2, 3, 4, 4, seed=2)
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(function, twins, v))


def test_equal_branches_share_the_weight() -> None:
    x, v = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    function = network(conditions(1.0, 2.0, 1.0, 2.0))
    calls = NetworkCalls()
    calls.add(linearize(function, torch.cat([x, x])))
    alone = network(conditions(1.0, 2.0))
    linear, _ = calls.take(alone(x))
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(alone, x, v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("difference", [1e-3, 1e-6, 1e-9])
def test_nearly_equal_branches_are_told_apart_as_far_as_it_matters(difference: float) -> None:
    x, v = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    condition = torch.cat([conditions(1.0, 2.0), (1 + difference) * conditions(1.0, 2.0)])

    def guided(x: Tensor) -> Tensor:
        uncond, cond = network(condition)(torch.cat([x, x])).chunk(2)
        return uncond + 7.5 * (cond - uncond)

    calls = NetworkCalls()
    calls.add(linearize(network(condition), torch.cat([x, x])))
    linear, _ = calls.take(guided(x))
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(guided, x, v), rtol=1e-6, atol=1e-6)


def test_a_network_that_predicts_nothing_is_its_own_mixture() -> None:
    calls = NetworkCalls()
    calls.add(linearize(lambda x: 0 * x, normal(2, 3, 4, 4)))
    linear, copies = calls.take(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    assert copies == 1 and (linear.product(normal(2, 3, 4, 4)) == 0).all()


def test_a_prediction_that_the_pipeline_turns_round() -> None:
    x, v = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    function = network(conditions(1.0, 2.0))
    calls = NetworkCalls()
    calls.add(linearize(function, x))
    linear, _ = calls.take(-function(x))
    torch.testing.assert_close(linear.product(v), -jacobian_transposed_times(function, x, v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["vjp", "jvp", "difference"])
def test_inputs_and_outputs_with_channels_that_the_sample_lacks(method: ProductMethod) -> None:
    """Inpainting networks see a mask beside the sample; those with a learned variance say more than the prediction."""
    x, v = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    mask = normal(2, 2, 4, 4, seed=3)
    linear_part = normal(4, 5, seed=4)

    def forward(x: Tensor) -> Tensor:
        return torch.sin(torch.einsum("oi,bihw->bohw", linear_part, x))

    def prediction(x: Tensor) -> Tensor:
        return forward(torch.cat([x, mask], dim=1))[:, :3]

    calls = NetworkCalls()
    calls.add(linearize(forward, torch.cat([x, mask], dim=1), method=method))
    linear, _ = calls.take(prediction(x))
    if method == "vjp":
        expected = jacobian_transposed_times(prediction, x, v)
    else:
        expected = torch.func.jvp(prediction, (x,), (v,))[1]
    torch.testing.assert_close(linear.product(v), expected, rtol=1e-5, atol=1e-5)


def test_more_tokens_in_than_out() -> None:
    """Editing networks append the tokens of a reference image to those of the sample."""
    x, reference, v = normal(2, 6, 4, seed=1), normal(2, 3, 4, seed=2), normal(2, 6, 4, seed=3)
    mixing = normal(9, 9, seed=4)

    def forward(x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("ts,bsc->btc", mixing, x))

    def prediction(x: Tensor) -> Tensor:
        return forward(torch.cat([x, reference], dim=1))[:, :6]

    calls = NetworkCalls()
    calls.add(linearize(forward, torch.cat([x, reference], dim=1)))
    linear, _ = calls.take(prediction(x))
    torch.testing.assert_close(linear.product(v), jacobian_transposed_times(prediction, x, v))


@pytest.mark.parametrize("handed_on", [torch.bfloat16, torch.float32])
def test_mixtures_rounded_to_half_precision(handed_on: torch.dtype) -> None:
    x = normal(2, 3, 8, 8, seed=1).bfloat16()
    function = network(conditions(0.5, 0.5, 1.0, 2.0, dtype=torch.bfloat16))
    linear = linearize(function, torch.cat([x, x]))
    uncond, cond = linear.output.chunk(2)
    calls = NetworkCalls()
    calls.add(linear)
    mixed, _ = calls.take((uncond + 7.5 * (cond - uncond)).to(handed_on))
    wide = network(conditions(0.5, 0.5, 1.0, 2.0, dtype=torch.float64))

    def guided(x: Tensor) -> Tensor:
        uncond, cond = wide(torch.cat([x, x])).chunk(2)
        return uncond + 7.5 * (cond - uncond)

    v = normal(2, 3, 8, 8, seed=2)
    expected = jacobian_transposed_times(guided, x.double(), v)
    assert (mixed.product(v) - expected).norm() <= 0.05 * expected.norm()


def rescaled(guided: Tensor, cond: Tensor) -> Tensor:
    """Guidance rescale as the pipelines do it (2305.08891, section 3.4), at 0.7."""
    axes = list(range(1, guided.ndim))
    ratio = cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return 0.7 * guided * ratio + 0.3 * guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bend", ["rescale", "clip", "square"])
def test_what_is_no_affine_mixture_is_refused(bend: str, batch: int, dtype: torch.dtype) -> None:
    x = normal(batch, 3, 8, 8, seed=1).to(dtype)
    condition = torch.cat([conditions(*[0.5] * batch), conditions(*range(1, batch + 1))]).to(dtype)
    linear = linearize(network(condition), torch.cat([x, x]))
    uncond, cond = linear.output.chunk(2)
    guided = uncond + 7.5 * (cond - uncond)
    bent = {"rescale": rescaled(guided, cond), "clip": guided.clamp(-1, 1), "square": guided + 0.5 * guided**2}[bend]
    calls = NetworkCalls()
    calls.add(linear)
    with pytest.raises(ValueError, match="no affine mixture of the model's outputs"):
        calls.take(bent)
    assert calls.calls == []


def test_calls_that_do_not_fit_are_named() -> None:
    calls = NetworkCalls()
    with pytest.raises(ValueError, match="not called between two scheduler steps"):
        calls.take(normal(1, 3, 4, 4))
    calls.add(linearize(lambda x: x, normal(3, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"a batch of 2, the model returned batches of \[3\]"):
        calls.take(normal(2, 3, 4, 4))
    calls.add(linearize(lambda x: x, normal(2, 16, 4)))
    with pytest.raises(ValueError, match="the scheduler received a tensor of shape"):
        calls.take(normal(2, 4, 4, 4))


def test_old_calls_and_their_graphs_are_dropped() -> None:
    calls = NetworkCalls()
    graphs: list[weakref.ref[Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        hidden = 2 * x
        graphs.append(weakref.ref(hidden))
        return hidden.sin()

    x = normal(1, 3, 4, 4)
    for _ in range(6):
        calls.add(linearize(forward, x))
    gc.collect()
    assert sum(graph() is not None for graph in graphs) == len(calls.calls) == 4
    taken = calls.take(calls.calls[0].output)
    assert calls.calls == []
    del taken
    gc.collect()
    assert not any(graph() is not None for graph in graphs)
    calls.add(Linearization(x, lambda v: v))
    calls.clear()
    assert calls.calls == []
