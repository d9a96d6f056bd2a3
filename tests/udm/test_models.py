"""Who predicts: the table against enumeration, and what a network is called with."""

from types import SimpleNamespace

import pytest
import torch

from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, NetworkModel, TableModel, TokenModel

CLOSE = {"rtol": 0, "atol": 1e-12}
KERNELS = [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


def one(alpha, batch=1):
    return torch.full((batch,), alpha, dtype=torch.float64)


@by_kernel
@pytest.mark.parametrize("kind", ["denoiser", "leave_one_out"])
@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_a_table_is_the_exact_posterior(enumeration, oracle_of, channel_of, states_of, kernel, kind, alpha):
    """Of every state of three positions, of both kinds."""
    world = enumeration.World.random(3, 2, seed=2) if kernel.has_noise_tokens else enumeration.World.random(3, 3)
    state, channel = states_of(kernel, world.length), channel_of(kernel, alpha)
    model = TableModel(oracle=oracle_of(world), kernel=kernel, kind=kind)
    assert isinstance(model, TokenModel)
    prediction = model(state, one(alpha, len(state.tokens)))
    expected = world.denoiser(channel) if kind == "denoiser" else world.leave_one_out(channel)
    assert (prediction.kind, prediction.channel) == (kind, kernel.channel)
    torch.testing.assert_close(prediction.log_probs().exp(), expected, **CLOSE)
    # Asked about some positions, in row-major order.
    rows = torch.rand(state.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    some = model(state, one(alpha, len(state.tokens)), rows=rows)
    torch.testing.assert_close(some.log_probs().exp(), expected[rows], **CLOSE)
    if kernel.channel != "masked":
        assert torch.equal(some.tokens, state.tokens[rows])


@by_kernel
def test_given_positions_are_observed_clean(world, oracle_of, kernel):
    """p(x_0 at 1 | x_0 at 0, x_t at 1), whatever the kernel would make of the clue."""
    model = TableModel(oracle=oracle_of(world), kernel=kernel, kind="leave_one_out")
    for clue in range(3):
        tokens = torch.tensor([[clue, 1]])
        state = TokenState(tokens=tokens, noise=torch.tensor([[clue, 1]]) if kernel.has_noise_tokens else None)
        prediction = model(state, one(0.3), given=torch.tensor([[True, False]]))
        expected = world.table[clue] / world.table[clue].sum()
        torch.testing.assert_close(prediction.log_probs().exp()[0, 1], expected, **CLOSE)


def test_a_table_gives_no_score(world, oracle_of):
    with pytest.raises(ValueError, match=r"ask its prediction for .score\(\)"):
        TableModel(oracle=oracle_of(world), kernel=Uniform(3), kind="score")


def test_given_logits_are_passed_on():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    state, alpha = TokenState(tokens=torch.tensor([[0, 1, 2], [3, 3, 0]])), torch.tensor([0.25, 0.75]).double()
    model = GivenLogits(logits=logits, kind="denoiser")
    assert model(state, alpha).logits is logits
    rows = torch.tensor([[True, False, False], [False, True, True]])
    prediction = model(state, alpha, rows=rows)
    assert torch.equal(prediction.logits, logits[rows])
    assert prediction.tokens.tolist() == [0, 3, 0]
    assert prediction.alpha.tolist() == [0.25, 0.75, 0.75]
    assert isinstance(model, TokenModel)


class Recorder:
    """A network that answers with zeros and keeps what it was called with."""

    def __init__(self, wrap):
        self.wrap = wrap

    def __call__(self, input_ids, alpha, **inputs):
        self.inputs = {"input_ids": input_ids, "alpha": alpha, **inputs}
        rows = inputs.get("rows")
        shape = input_ids.shape if rows is None else (int(rows.sum()),)
        return self.wrap(torch.zeros(*shape, 5))


class Output(SimpleNamespace):
    """As diffusers' outputs: its first entry is the logits."""

    def __init__(self, logits):
        super().__init__(logits=logits)

    def __getitem__(self, index):
        return (self.logits,)[index]


@pytest.mark.parametrize(
    "wrap", [lambda logits: logits, lambda logits: (logits, "more"), Output], ids=["bare", "tuple", "output"]
)
def test_a_network_is_told_what_there_is(wrap):
    state, alpha = TokenState(tokens=torch.tensor([[0, 1, 2]])), one(0.5)
    network = Recorder(wrap)
    prediction = NetworkModel(network=network, kind="denoiser")(state, alpha)
    assert set(network.inputs) == {"input_ids", "alpha"}
    assert prediction.logits.shape == (1, 3, 5)
    assert prediction.kind == "denoiser"

    noisy = TokenState(tokens=state.tokens, noise=torch.tensor([[0, 0, 2]]))
    rows = torch.tensor([[True, False, True]])
    given, valid = ~rows, torch.tensor([[True, True, False]])
    model = NetworkModel(network=network, kind="leave_one_out", channel="absorbing")
    prediction = model(noisy, alpha, given=given, valid=valid, rows=rows)
    expected = {
        "input_ids": noisy.tokens,
        "alpha": alpha,
        "noise_ids": noisy.noise,
        "given": given,
        "attention_mask": valid,
        "rows": rows,
    }
    assert set(network.inputs) == set(expected)
    assert all(network.inputs[name] is value for name, value in expected.items())
    assert (prediction.kind, prediction.channel) == ("leave_one_out", "absorbing")
    assert prediction.tokens.tolist() == [0, 2]

    NetworkModel(network=network, kind="denoiser", knows_given=False)(state, alpha, given=given)
    assert "given" not in network.inputs
