"""FLOPs against their closed forms, the same bits with and without counting, and the peaks of devices."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from wellposed.training import flops
from wellposed.training.flops import PEAKS, FlopCounter, arithmetic_of, device_name, device_peak, nominal_peak

CPU = torch.device("cpu")


def counted(forward, backward=True):
    counter = FlopCounter()
    with counter.forward():
        loss = forward().sum()
    if backward:
        with counter.backward():
            loss.backward()
    return counter


def linear(rows=5, wide=(7, 11), requires_grad=True):
    layer = nn.Linear(*wide)
    x = torch.randn(rows, wide[0], requires_grad=requires_grad)
    return lambda: layer(x)


@pytest.mark.parametrize(("to_input", "products"), [(True, 3), (False, 2)])
def test_a_layer_takes_two_flops_a_weight_and_row_and_twice_that_for_its_gradients(to_input, products):
    assert counted(linear(requires_grad=to_input)).flops == products * 2 * 5 * 7 * 11
    assert counted(linear(requires_grad=to_input), backward=False).flops == 2 * 5 * 7 * 11


def test_a_convolution():
    layer = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    assert counted(lambda: layer(x)).flops == 2 * (2 * 2 * 8 * 8 * 3 * 4 * 9)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_alike_however_it_is_computed(fused):
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 6, 6))

    def attend():
        if fused:
            return scaled_dot_product_attention(query, key, value)
        return (query @ key.mT).softmax(-1) @ value

    assert counted(attend).flops == 3 * (2 * 2 * 3 * 10 * 6 * (8 + 8))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_repeats_is_counted_apart(reentrant):
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    x = torch.randn(3, 4, requires_grad=True)
    plain = counted(lambda: net(x))
    saving = counted(lambda: checkpoint(net, x, use_reentrant=reentrant))
    assert saving.flops == plain.flops
    assert plain.recomputed == 0
    # The reentrant kind repeats all, the other stops at the last input that a gradient needs.
    assert saving.recomputed == (plain.flops // 3 if reentrant else 2 * 3 * 4 * 8)


def test_gradients_within_a_loss_count_as_forward():
    """A gradient penalty: the first gradient is part of the loss, and differentiated in its turn."""
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return gradient.square()

    counter = counted(penalty, backward=False)
    assert counter.flops == 2 * (2 * 3 * 4 * 4)
    assert counter.recomputed == 0


def test_counting_changes_no_bit():
    torch_generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(16, 4, generator=torch_generator)

    def gradients(counter):
        net.zero_grad()
        if counter is None:
            net(x).square().mean().backward()
        else:
            with counter.forward():
                loss = net(x).square().mean()
            with counter.backward():
                loss.backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    for a, b in zip(gradients(None), gradients(FlopCounter()), strict=True):
        assert torch.equal(a, b)


def test_an_operation_whose_flops_cannot_be_told_makes_the_count_incomplete(monkeypatch, caplog):
    def formula(*args, out_val):
        raise AssertionError("odd shapes")

    counter = FlopCounter()
    counter._formulas[torch.ops.aten.addmm] = formula
    with counter.forward():
        out = linear()()
    assert out.shape == (5, 11)
    assert not counter.complete
    assert "aten.addmm are unknown here (odd shapes)" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_devices_are_known_by_their_names(name, peak):
    assert nominal_peak(name, "bf16") == peak


def test_more_precise_arithmetic_is_never_faster():
    for peaks in PEAKS.values():
        assert peaks["bf16"] >= peaks["tf32"] >= peaks["fp32"] > 0


def test_a_cpu_is_measured_once():
    peak = device_peak(CPU, "fp32")
    assert peak.source == "measured"
    assert 1e7 < peak.flop_per_second < 1e15
    assert device_peak(CPU, "fp32") == peak
    assert "threads" in device_name(CPU)


def test_the_measured_peak_is_that_of_the_fastest_product(monkeypatch):
    flops._measured_peak.cache_clear()
    monkeypatch.setattr(flops, "_product_seconds", lambda matrix: len(matrix) ** 3 / 1e12)
    assert device_peak(CPU, "fp32").flop_per_second == pytest.approx(2e12)
    flops._measured_peak.cache_clear()


def test_arithmetic_of_a_run():
    weight, half = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    assert arithmetic_of("fp32", [weight], CPU) == "fp32"
    assert arithmetic_of("bf16", [weight], CPU) == "bf16"
    assert arithmetic_of("fp32", [weight, half], CPU) == "bf16"
    cuda = torch.device("cuda")
    assert arithmetic_of("fp32", [weight], cuda) == "fp32"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert arithmetic_of("fp32", [weight], cuda) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
