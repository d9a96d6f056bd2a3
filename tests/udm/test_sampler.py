"""The loop: what comes out, what it costs, and what it may depend on."""

import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.batches import TextBatch
from wellposed.udm.corrector import Corrector
from wellposed.udm.draws import Truncation
from wellposed.udm.grids import alpha_grid
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.models import GivenLogits, TableModel
from wellposed.udm.remasking import Remasking
from wellposed.udm.sampler import sample, split_budget
from wellposed.udm.steps import SamplingSettings

KERNELS = [Uniform(3), MaximalCoupling(3), Masked(3), Absorbing(3), RefreshedAbsorbing(3)]
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


def blank(count, length=2):
    return TextBatch(tokens=torch.zeros(count, length, dtype=torch.long))


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def chain_law(kernel, model, states, grid):
    """The exact law of the sampler's output, by the dense bridges at every state."""
    count, length = states.tokens.shape
    size = kernel.vocab_size
    if kernel.channel == "uniform":
        law = torch.full((count,), 1 / count, dtype=torch.float64)
    elif kernel.channel == "masked":
        law = (states.tokens == size).all(-1).double()
    else:
        law = (states.tokens == states.noise).all(-1).double() / size**length
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        alpha_t, alpha_s = (torch.full((count,), a, dtype=torch.float64) for a in (t, s))
        clean = model(states, alpha_t).to(kernel.plugs_in).log_probs().exp()
        bridge = kernel.bridge(states, clean, alpha_t, alpha_s)
        matrix = torch.ones(count, count, dtype=torch.float64)
        for i in range(length):
            step = bridge[:, i][:, states.tokens[:, i]]
            if states.noise is not None:  # u stays
                step = step * (states.noise[:, None, i] == states.noise[None, :, i])
            matrix = matrix * step
        law = law @ matrix
    return law


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=lambda k: type(k).__name__)
def test_few_steps_have_the_law_of_the_chain_of_bridges(world, oracle_of, enumeration, states_of, symbols_of, kernel):
    """4 steps, 1e5 sequences: identity 12 along a whole chain, starting from the prior."""
    grid = torch.tensor([1e-3, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    model, states = TableModel(oracle=oracle_of(world), kernel=kernel), states_of(kernel, 2)
    law = chain_law(kernel, model, states, grid)
    expected = torch.zeros(16, dtype=torch.float64).scatter_add(0, enumeration.index_of(states.tokens, 4), law)
    tokens, record = sample(model, kernel, blank(100_000), grid, generator=source())
    assert record.evaluations == 4
    assert enumeration.total_variation(enumeration.law_of(tokens, 4), expected) < 8e-3


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=lambda k: type(k).__name__)
def test_the_exact_model_converges_to_the_data(world, oracle_of, enumeration, states_of, kernel):
    """The error of n parallel steps falls like 1/n, for what the kernel plugs in."""
    model, states = TableModel(oracle=oracle_of(world), kernel=kernel), states_of(kernel, 2)
    errors = []
    for n in (8, 16, 64):
        law = chain_law(kernel, model, states, alpha_grid(n))
        of_tokens = torch.zeros(16, dtype=torch.float64).scatter_add(0, enumeration.index_of(states.tokens, 4), law)
        expected = torch.zeros(16, dtype=torch.float64).scatter_add(
            0, enumeration.index_of(world.sequences, 4), world.law
        )
        errors.append(enumeration.total_variation(of_tokens, expected))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.35)
    assert errors[2] < 0.2 * errors[0]


def test_the_denoiser_plugged_in_does_not_converge(world, oracle_of, enumeration, states_of):
    """The same network read as if its denoiser were the leave-one-out posterior."""
    kernel, states = Uniform(3), states_of(Uniform(3), 2)

    def misread(state, alpha, **asked):
        table = TableModel(oracle=oracle_of(world), kernel=kernel, kind="denoiser")
        return GivenLogits(logits=table(state, alpha).logits, kind="leave_one_out")(state, alpha)

    law = chain_law(kernel, misread, states, alpha_grid(256))
    assert enumeration.total_variation(law, world.law) > 0.05


def test_refreshed_noise_ends_at_the_data_too(world, oracle_of, enumeration):
    """Its chain of pairs (x, u) is not enumerated above."""
    model = TableModel(oracle=oracle_of(world), kernel=RefreshedAbsorbing(3))
    tokens, record = sample(model, RefreshedAbsorbing(3), blank(20_000), alpha_grid(32), generator=source())
    assert record.evaluations == 32
    assert enumeration.total_variation(enumeration.law_of(tokens, 3), world.law) < 0.015


def test_corrections_bring_a_coarse_chain_closer(world, oracle_of, enumeration):
    """Exact Gibbs moves after each of four steps leave less error than the steps alone."""
    kernel, model = Uniform(3), TableModel(oracle=oracle_of(world), kernel=Uniform(3))
    grid = torch.tensor([1e-3, 0.6, 0.97, 1.0], dtype=torch.float64)
    errors = []
    for corrector in (None, Corrector(steps=6, k=1, selection="random")):
        tokens, _ = sample(model, kernel, blank(30_000), grid, corrector=corrector, generator=source())
        errors.append(enumeration.total_variation(enumeration.law_of(tokens, 3), world.law))
    assert errors[1] < 0.5 * errors[0]


@by_kernel
def test_infilling_has_the_conditional_law(oracle_of, enumeration, kernel):
    """A clue at the first of two positions: the other one is drawn from the data's conditional, in one step or many."""
    world = enumeration.World.random(3, 2, seed=6)
    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    clues = torch.arange(3).repeat_interleave(10_000)
    canvas = TextBatch(
        tokens=torch.stack([clues, torch.full_like(clues, 99)], 1),  # anything where nothing is given
        given=torch.tensor([True, False]).expand(len(clues), -1),
    )
    for steps in (1, 3):
        tokens, _ = sample(model, kernel, canvas, alpha_grid(steps), generator=source(steps))
        assert torch.equal(tokens[:, 0], clues)
        for clue in range(3):
            law = torch.bincount(tokens[clues == clue, 1], minlength=3) / 10_000
            expected = world.table[clue] / world.table[clue].sum()
            assert enumeration.total_variation(law, expected) < 0.015


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=lambda k: type(k).__name__)
def test_padding_comes_back_as_it_was(oracle_of, enumeration, states_of, kernel):
    """And the sequence beside it has the law of a chain that has never heard of it."""
    world = enumeration.World.random(3, 3, seed=6)
    shorter = enumeration.World(world.table.sum(-1))
    grid = torch.tensor([1e-3, 0.4, 0.8, 1.0], dtype=torch.float64)
    canvas = TextBatch(tokens=torch.full((20_000, 3), 77), valid=torch.tensor([True, True, False]).expand(20_000, -1))
    tokens, _ = sample(TableModel(oracle=oracle_of(world), kernel=kernel), kernel, canvas, grid, generator=source())
    assert (tokens[:, 2] == 77).all()
    states = states_of(kernel, 2)
    law = chain_law(kernel, TableModel(oracle=oracle_of(shorter), kernel=kernel), states, grid)
    expected = torch.zeros(16, dtype=torch.float64).scatter_add(0, enumeration.index_of(states.tokens, 4), law)
    assert enumeration.total_variation(enumeration.law_of(tokens[:, :2], 4), expected) < 0.015


def counted(kernel, evaluations, corrector):
    """Calls of a model that counts them, by a sampler with this budget."""
    calls = 0

    class Counting(GivenLogits):
        def __call__(self, *arguments, **inputs):
            nonlocal calls
            calls += 1
            return super().__call__(*arguments, **inputs)

    steps, corrected = split_budget(evaluations, corrector)
    model = Counting(logits=torch.zeros(1, 1, kernel.vocab_size), kind="leave_one_out", channel=kernel.channel)
    _, record = sample(
        model,
        kernel,
        blank(1, 1),
        alpha_grid(steps),
        corrector=corrector,
        corrected_steps=corrected,
        generator=source(),
    )
    assert record.evaluations == calls
    assert record.corrections == calls - steps
    return calls


@pytest.mark.parametrize("metropolis", [False, True])
def test_identity_22_the_budget_is_split_exactly(metropolis):
    """For N in 1..300 and C in 0..4: steps and corrections add up to N, and the last step is not corrected."""
    for c in range(5):
        corrector = Corrector(steps=c, k=1, metropolis=metropolis) if c else None
        calls = c + metropolis if c else 0
        for n in range(1, 301):
            steps, corrected = split_budget(n, corrector)
            assert steps + calls * corrected == n
            assert 0 <= corrected < steps
            if c:
                assert n - (1 + calls) * corrected - 1 < 1 + calls  # no more could be corrected
            else:
                assert (steps, corrected) == (n, 0)
    assert split_budget(256, Corrector(steps=2)) == (86, 85)


@pytest.mark.parametrize(
    "corrector",
    [
        None,
        Corrector(steps=1),
        Corrector(steps=4),
        Corrector(steps=3, k=1, selection="random"),
        Corrector(steps=2, k=1, metropolis=True),
    ],
    ids=["none", "C1", "C4", "random", "metropolis"],
)
def test_identity_22_a_uniform_chain_makes_as_many_calls_as_it_may(corrector):
    for kernel in (Uniform(2), RefreshedAbsorbing(2)) if corrector is None else (Uniform(2),):
        for n in (1, 2, 3, 5, 11):
            assert counted(kernel, n, corrector) == n


@pytest.mark.parametrize(("asked", "corrected"), [(None, 3), (0, 0), (2, 2), (9, 3)])
def test_the_last_step_is_never_corrected(asked, corrected):
    """By default all others are."""
    model = GivenLogits(logits=torch.zeros(1, 1, 2), kind="leave_one_out")
    _, record = sample(
        model,
        Uniform(2),
        blank(1, 1),
        alpha_grid(4),
        corrector=Corrector(steps=2),
        corrected_steps=asked,
        generator=source(),
    )
    assert (record.evaluations, record.corrections) == (4 + 2 * corrected, 2 * corrected)


@pytest.mark.parametrize("kernel", [Masked(2), Absorbing(2), MaximalCoupling(2)], ids=lambda k: type(k).__name__)
def test_chains_that_wait_make_fewer_calls(kernel):
    """One position is revealed once: one call or, where a jump may lead back to u or x, a few, and not one a step."""
    for seed in range(3):
        tokens, record = sample(
            GivenLogits(logits=torch.zeros(1, 1, 2), kind="denoiser", channel=kernel.channel),
            kernel,
            blank(1, 1),
            alpha_grid(32),
            generator=source(seed),
        )
        assert 1 <= record.evaluations <= (1 if kernel.channel == "masked" else 10)
        assert 0 <= int(tokens) < 2


@by_kernel
def test_one_generator_a_sequence_makes_it_independent_of_the_batch(world, oracle_of, kernel):
    """With everything that draws: steps, a truncation, and corrections or revision."""
    grid, options = alpha_grid(4), {}
    if kernel.channel == "uniform":
        options["corrector"] = Corrector(steps=1, k=1, metropolis=True)
    else:
        plan = Remasking(schedule="rescale", eta=0.5).plan(4)
        grid, options["sigmas"] = plan.alphas, plan.sigmas
    settings = SamplingSettings(temperature=1.5, truncation=Truncation(top_p=0.95))
    model = TableModel(oracle=oracle_of(world), kernel=kernel)

    def run(generator, count):
        return sample(model, kernel, blank(count), grid, settings=settings, generator=generator, **options)[0]

    def sources(*seeds):
        return [source(seed) for seed in seeds]

    whole = run(sources(*range(12)), 12)
    assert len(whole.unique(dim=0)) > 2
    assert torch.equal(run(sources(7, 0, 11), 3), whole[[7, 0, 11]])
    # Without revision too, where the step is the kernel's own.
    plain = [
        sample(model, kernel, blank(len(seeds)), alpha_grid(4), generator=sources(*seeds))[0]
        for seeds in (range(6), (3, 1))
    ]
    assert torch.equal(plain[0][[3, 1]], plain[1])
    # One for all gives the same again.
    assert torch.equal(run(source(5), 12), run(source(5), 12))


def test_the_confidence_sampler_is_deterministic_given_its_start(world, oracle_of):
    """It writes ceil(L / steps) positions a step."""
    kernel, model = Uniform(3), TableModel(oracle=oracle_of(world), kernel=Uniform(3))
    states = []
    tokens, record = sample(
        model,
        kernel,
        blank(50),
        alpha_grid(2),
        strategy="confidence",
        generator=source(),
        on_step=lambda index, state: states.append(state.tokens),
    )
    assert record.evaluations == 2
    assert torch.equal(states[-1], tokens)
    prior = kernel.prior(blank(50).tokens, generator=source()).tokens
    for before, after in ((prior, states[0]), (states[0], tokens)):
        assert ((before != after).sum(-1) <= 1).all()
    again, _ = sample(model, kernel, blank(50), alpha_grid(2), strategy="confidence", generator=source())
    assert torch.equal(again, tokens)


def test_a_callback_sees_every_step_and_may_change_it(world, oracle_of):
    kernel, seen = Uniform(3), []

    def watch(index, state):
        seen.append(index)
        return TokenState(tokens=torch.full_like(state.tokens, 2)) if index == 3 else None

    model = TableModel(oracle=oracle_of(world), kernel=kernel)
    canvas = TextBatch(tokens=torch.zeros(5, 2, dtype=torch.long), given=torch.tensor([True, False]).expand(5, -1))
    tokens, _ = sample(model, kernel, canvas, alpha_grid(4), generator=source(), on_step=watch)
    assert seen == [0, 1, 2, 3]
    assert tokens.tolist() == [[0, 2]] * 5  # what is given stays even so


def test_misuse_is_refused(world, oracle_of):
    model = TableModel(oracle=oracle_of(world), kernel=Uniform(3))

    def run(kernel=KERNELS[0], canvas=None, alphas=None, **options):
        return sample(model, kernel, canvas or blank(2), alpha_grid(4) if alphas is None else alphas, **options)

    for alphas in ([1.0], [0.0, 1.0], [0.1, 0.9], [0.5, 0.4, 1.0], [0.1, 0.5, 0.5, 1.0], [-0.1, 1.0]):
        with pytest.raises(ValueError, match="alphas must rise"):
            run(alphas=torch.tensor(alphas, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 3 sigmas for 4 steps"):
        run(Masked(3), sigmas=torch.zeros(3))
    with pytest.raises(ValueError, match="revises by itself"):
        run(sigmas=torch.zeros(4))
    with pytest.raises(ValueError, match="freezes what it has revealed"):
        run(Masked(3), corrector=Corrector())
    for options in ({"kernel": Masked(3)}, {"corrector": Corrector()}, {"sigmas": torch.zeros(4)}):
        with pytest.raises(ValueError, match="confidence sampler"):
            run(strategy="confidence", **options)
    with pytest.raises(ValueError, match="got 3 generators for 2 sequences"):
        run(generator=[torch.Generator() for _ in range(3)])
    with pytest.raises(ValueError, match="network evaluations"):
        split_budget(0, None)
    given = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"clean tokens must lie in \[0, 3\)"):
        run(canvas=TextBatch(tokens=torch.tensor([[3, 0], [0, 0]]), given=given))
    # A mask of one row would broadcast.
    canvas = blank(2)
    for name in ("given", "valid"):
        object.__setattr__(canvas, name, given[:1])
        with pytest.raises((ValueError, TypeCheckError), match=r"\(1, 2\)|bool\[1,2\]"):
            run(canvas=canvas)
        object.__setattr__(canvas, name, None)
