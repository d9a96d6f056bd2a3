"""Three ways to a product with a Jacobian, in networks that make two of them hard."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from wellposed.lgs.jacobian import linearize
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import RectifiedFlow

METHODS = ("vjp", "jvp", "difference")


@pytest.fixture
def oracle() -> GaussianMixtureOracle:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64) / 3
    return GaussianMixtureOracle(
        weights=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        means=torch.randn(3, 6, generator=generator, dtype=torch.float64),
        covariances=factors @ factors.mT,
        path=RectifiedFlow(),
    )


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("method", "tolerance"), [("vjp", 1e-12), ("jvp", 1e-12), ("difference", 1e-6)])
def test_on_an_exact_denoiser_all_methods_are_the_posterior_covariance(
    oracle: GaussianMixtureOracle, method: str, tolerance: float
) -> None:
    x, v = normal(4, 6, seed=1), normal(4, 6, seed=2)
    linear = linearize(lambda x: oracle.predict(x, 0.4), x, method=method)
    # C = (sigma^2 / alpha) J, and J is symmetric.
    expected = torch.einsum("bij,bj->bi", oracle.posterior_covariance(x, 0.4), v) * 0.6 / 0.4**2
    assert (linear.product(v) - expected).abs().max() <= tolerance * expected.abs().max()
    torch.testing.assert_close(linear.output, oracle.predict(x, 0.4), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ["unet", "dit", "sd3", "flux"])
def test_products_in_networks_with_attention(tiny, case: str, mode) -> None:
    torch.manual_seed(1)
    module, forward, x = tiny.cases[case]()
    with mode():
        x, v, w = x.clone(), torch.randn_like(x), torch.randn_like(x)
        products = {
            method: linearize(forward, x, method=method, module=module).product(w if method == "vjp" else v)
            for method in METHODS
        }
    jv_w = (products["jvp"] * w).sum()
    # A random network's Jacobian is not symmetric, so J v and J^T w meet in w.J v = v.J^T w only.
    torch.testing.assert_close((products["vjp"] * v).sum(), jv_w, rtol=1e-3, atol=1e-4)
    assert (products["difference"] - products["jvp"]).norm() <= 5e-3 * products["jvp"].norm()
    assert products["jvp"].norm() > 0


@pytest.mark.parametrize("method", METHODS)
def test_product_is_repeatable_linear_and_in_the_vectors_dtype(tiny, method: str) -> None:
    module, forward, x = tiny.cases["unet"]()
    linear = linearize(forward, x, method=method, module=module)
    v = normal(2, 3, 8, 8, seed=3)
    first = linear.product(v)
    assert first.dtype == torch.float64
    torch.testing.assert_close(linear.product(v), first, rtol=0, atol=0)
    torch.testing.assert_close(linear.product(3 * v), 3 * first, rtol=5e-3, atol=5e-3)
    assert (linear.product(torch.zeros_like(v)) == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision_networks_give_products_of_their_precision(tiny, dtype: torch.dtype, tolerance: float) -> None:
    module = tiny.unet().to(dtype)
    x, v = normal(2, 3, 8, 8, seed=1).to(dtype), normal(2, 3, 8, 8, seed=2).float()
    v = v / v.norm()
    product = linearize(lambda x: module(x, 500).sample, x, module=module).product(v)
    wide = tiny.unet().to(dtype).float()
    expected = linearize(lambda x: wide(x, 500).sample, x.float(), module=wide).product(v)
    assert product.dtype == torch.float32
    assert (product - expected).norm() <= tolerance * expected.norm()


def test_small_float16_gradients_do_not_underflow() -> None:
    weak = nn.Conv2d(3, 3, 1, bias=False).half()
    with torch.no_grad():
        weak.weight.mul_(2.0**-14)
    x = normal(1, 3, 64, 64, seed=1).half()
    v = normal(1, 3, 64, 64, seed=2).float()
    v = v / v.norm()
    product = linearize(weak, x, module=weak).product(v)
    exact = torch.einsum("oi,bohw->bihw", weak.weight[:, :, 0, 0].float(), v)
    assert (product - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing(tiny, training: bool) -> None:
    module, forward, x = tiny.cases["unet"]()
    v = torch.randn_like(x)
    expected = linearize(forward, x, module=module).product(v)
    module.enable_gradient_checkpointing()
    module.train(training)
    with torch.no_grad():
        linear = linearize(forward, x, module=module)
        for _ in range(2):
            torch.testing.assert_close(linear.product(v), expected, rtol=1e-5, atol=1e-6)


def test_parameters_are_left_as_they_were_and_save_nothing(tiny) -> None:
    module, forward, x = tiny.cases["unet"]()
    module.conv_in.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    linear = linearize(forward, x, module=module)
    linear.product(torch.randn_like(x))
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not x.requires_grad and not linear.output.requires_grad

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        linearize(broken, x, module=module)
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == before


def test_graph_dies_with_the_linearization() -> None:
    saved: list[weakref.ref[Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        hidden = x * 2
        saved.append(weakref.ref(hidden))
        return hidden.sin()

    linear = linearize(forward, torch.randn(1, 4))
    assert saved[0]() is not None
    del linear
    gc.collect()
    assert saved[0]() is None


def test_shapes_of_products_where_input_and_output_differ() -> None:
    widen = nn.Conv2d(3, 5, 1)
    x = torch.randn(2, 3, 4, 4)
    pulled = linearize(widen, x, module=widen)
    pushed = linearize(widen, x, module=widen, method="jvp")
    assert pulled.product_shape == (2, 5, 4, 4) and pulled.product(torch.ones(2, 5, 4, 4)).shape == x.shape
    assert pushed.product_shape == (2, 3, 4, 4) and pushed.product(torch.ones(2, 3, 4, 4)).shape == (2, 5, 4, 4)


def test_what_cannot_be_differentiated_names_the_cure(tiny) -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="method='difference'"):
        linearize(lambda x: x.detach() * 2, x)
    weights = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="method='difference'"):  # a graph, but not to the sample
        linearize(lambda x: weights(x.detach()), x).product(x)
    detached = linearize(lambda x: x.detach() * 2, x, method="difference")
    torch.testing.assert_close(detached.product(x), 2 * x, rtol=1e-3, atol=1e-3)
    with pytest.raises(Exception, match="method"):  # a ValueError, or a TypeCheckError where shapes are checked
        linearize(lambda x: x, x, method="forward")
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="finite differences in"):
            linearize(lambda x: x, x.to(dtype), method="difference")


def test_active_dropout_is_refused(tiny) -> None:
    module = tiny.unet(dropout=0.1)
    x = torch.randn(1, 3, 8, 8)
    linearize(lambda x: module(x, 1).sample, x, module=module)
    module.train()
    with pytest.raises(ValueError, match=r"dropout is active in .*call model.eval\(\)"):
        linearize(lambda x: module(x, 1).sample, x, module=module)
