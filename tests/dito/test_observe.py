import json
import math

import pytest
import torch
from diffusers import FluxTransformer2DModel

from wellposed.dito.hooks import MatchEvent
from wellposed.dito.matching import BipartiteMatcher, TokenWindows
from wellposed.dito.observe import OutputObserver, observe_outputs

HEIGHT, WIDTH, CHANNELS = 4, 6, 8
TOKENS = HEIGHT * WIDTH
WINDOWS = TokenWindows.of_coordinates(torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)))
SEED = 3


def random_output(seed, batch=2):
    return torch.randn(batch, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def event(step, output, inputs=None, *, site="block.0", context="cond", num_reduced=18):
    pairs = BipartiteMatcher()(output, WINDOWS, num_reduced, generator=torch.Generator().manual_seed(0))
    return MatchEvent(
        site=site,
        context=context,
        step=step,
        inputs=output if inputs is None else inputs,
        output=output,
        windows=WINDOWS,
        correspondence=pairs,
    )


def observer(*, gaps=(1, 2), num_pairs=400, ratio=0.75):
    return OutputObserver(ratio=ratio, gaps=gaps, num_pairs=num_pairs, seed=SEED)


def destinations_and_sources():
    return WINDOWS.draw(torch.Generator().manual_seed(SEED))


def nearest(features, destinations, sources):
    """The destination of largest cosine, for every source of every image, by loops."""
    chosen = {}
    for image, rows in enumerate(features):
        for i in sources.tolist():
            cosines = {j: float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()) for j in destinations.tolist()}
            chosen[image, i] = max(cosines, key=lambda j: cosines[j])
    return chosen


def error_of(chosen, output):
    wrong = sum(float((output[b, i] - output[b, j]).square().sum()) for (b, i), j in chosen.items())
    return wrong / sum(float(output[b, i].square().sum()) for b, i in chosen)


def test_what_does_not_change_persists():
    watching = observer()
    output = random_output(0)
    for step in range(4):
        watching(event(step, output))
    found = watching.summary()
    assert found.num_steps == 4
    assert found.pair_match_ratio == ((1.0,) * 3, (1.0,) * 2)
    assert found.persistence[0] == pytest.approx((1.0,) * 3)
    assert found.earlier_output_error == (found.output_error[1:], found.output_error[2:])
    assert found.input_output_correlation == pytest.approx((1.0,) * 4)
    assert found.input_error == found.output_error


def test_pairs_and_errors_agree_with_loops():
    # At ratio 3/4 all sources are dropped, so that the pairs are each source's nearest destination.
    outputs = [random_output(step) for step in range(3)]
    inputs = [random_output(10 + step) for step in range(3)]
    watching = observer()
    for step in range(3):
        watching(event(step, outputs[step], inputs[step]))
    found = watching.summary()
    destinations, sources = destinations_and_sources()
    by_output = [nearest(output, destinations, sources) for output in outputs]
    for row, gap in enumerate((1, 2)):
        for t in range(3 - gap):
            kept = sum(by_output[t][key] == by_output[t + gap][key] for key in by_output[t])
            assert found.pair_match_ratio[row][t] == pytest.approx(kept / len(by_output[t]))
            assert found.earlier_output_error[row][t] == pytest.approx(error_of(by_output[t], outputs[t + gap]))
    window = {int(WINDOWS.window[j]): j for j in destinations.tolist()}
    own = {(image, i): window[int(WINDOWS.window[i])] for image in range(2) for i in sources.tolist()}
    for t in range(3):
        assert found.output_error[t] == pytest.approx(error_of(by_output[t], outputs[t]))
        by_input = nearest(inputs[t], destinations, sources)
        assert found.input_error[t] == pytest.approx(error_of(by_input, outputs[t]))
        assert found.random_error[t] == pytest.approx(error_of(own, outputs[t]))


def test_nothing_beats_the_current_output_where_norms_are_equal():
    watching = observer(gaps=(1,))
    for step in range(3):
        output = random_output(step)
        watching(event(step, output / output.norm(dim=2, keepdim=True), random_output(20 + step)))
    found = watching.summary()
    for t in range(3):
        assert found.output_error[t] < min(found.input_error[t], found.random_error[t])
    for t in range(2):
        assert found.output_error[t + 1] < found.earlier_output_error[0][t]


def test_fewer_pairs_are_the_closest_ones_or_random_sources():
    watching = observer(gaps=(1,), ratio=0.25)
    output = random_output(0)
    watching(event(0, output, num_reduced=6))
    found = watching.summary()
    destinations, sources = destinations_and_sources()
    every = error_of(nearest(output, destinations, sources), output)
    assert found.output_error[0] < every
    # Six random sources of eighteen are not the same ones at every step.
    again = observer(gaps=(1,), ratio=0.25)
    for step in range(2):
        again(event(step, output, num_reduced=6))
    assert again.summary().random_error[0] != again.summary().random_error[1]


def test_correlations_are_those_of_all_pairs_of_tokens():
    # Of 276 pairs 20000 draws see each about 72 times.
    mixed = [0.7 * random_output(0) + 0.3 * random_output(step) for step in (1, 2)]
    inputs = 0.5 * mixed[0] + 0.5 * random_output(5)
    watching = observer(num_pairs=20000, gaps=(1,))
    watching(event(0, mixed[0], inputs))
    watching(event(1, mixed[1]))
    i, j = torch.combinations(torch.arange(TOKENS)).T

    def correlation(a, b):
        cosines = [torch.nn.functional.cosine_similarity(x[:, i], x[:, j], dim=2) for x in (a, b)]
        return sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*cosines, strict=True)) / len(a)

    found = watching.summary()
    assert found.persistence[0][0] == pytest.approx(correlation(*mixed), abs=0.02)
    assert found.input_output_correlation[0] == pytest.approx(correlation(inputs, mixed[0]), abs=0.02)


def test_tokens_that_stay_are_never_watched():
    # The last row is a reference image: its similarities would spoil a correlation that is 1 without them.
    movable = torch.arange(TOKENS) < TOKENS - WIDTH * 2
    windows = TokenWindows.of_coordinates(
        torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)), movable=movable
    )
    watching = observer(gaps=(1,))
    for step in range(2):
        output = torch.where(movable[:, None], random_output(0), random_output(1 + step))
        pairs = BipartiteMatcher()(output, windows, 6, generator=torch.Generator().manual_seed(0))
        watching(
            MatchEvent(
                site="a", context="", step=step, inputs=output, output=output, windows=windows, correspondence=pairs
            )
        )
    assert watching.summary().persistence[0][0] == pytest.approx(1)


def test_where_all_similarities_are_alike_there_is_no_correlation():
    watching = observer(gaps=(1,))
    for step in range(2):
        watching(event(step, torch.zeros(2, TOKENS, CHANNELS), random_output(step)))
    found = watching.summary()
    assert found.persistence == ((None,),)
    assert found.input_output_correlation == (None, None)
    # One image of the batch suffices.
    watching = observer(gaps=(1,))
    for step in range(2):
        output = random_output(0)
        output[0] = 1.0
        watching(event(step, output))
    assert watching.summary().persistence[0][0] == pytest.approx(1)


def test_sites_contexts_and_generations_are_not_compared_with_each_other():
    watching = observer(gaps=(1, 2))
    for _ in range(2):
        for step in range(3):
            for site in ("a", "b"):
                for number, context in enumerate(("cond", "uncond")):
                    watching(event(step, random_output(number + 10 * (site == "b")), site=site, context=context))
    found = watching.summary()
    assert found.sites == ("a", "b")
    assert found.pair_match_ratio == ((1.0, 1.0), (1.0,))
    assert found.site_pair_match_ratio == {"a": (1.0, 1.0), "b": (1.0, 1.0)}
    # A generation that was broken off after step 1 is not continued by the next one's steps.
    broken = observer(gaps=(1, 2))
    for step, seed in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1)):
        broken(event(step, random_output(seed)))
    assert broken.summary().pair_match_ratio == ((1.0, 1.0), (1.0,))


def test_means_are_over_sites_and_generations():
    watching = observer(gaps=(1,))
    for step in range(2):
        watching(event(step, random_output(0), site="still"))
        watching(event(step, random_output(step), site="moving"))
    found = watching.summary()
    still, moving = (found.site_pair_match_ratio[site][0] for site in ("still", "moving"))
    assert still == 1 > moving
    assert found.pair_match_ratio[0][0] == pytest.approx((still + moving) / 2)
    errors = [found.site_recovery_error[site][0] for site in found.sites]
    assert found.earlier_output_error[0][0] == pytest.approx(sum(errors) / 2)


def test_gaps_longer_than_the_run_are_empty():
    watching = observer(gaps=(1, 5))
    for step in range(2):
        watching(event(step, random_output(0)))
    found = watching.summary()
    assert found.pair_match_ratio == ((1.0,), ())
    assert found.site_pair_match_ratio == {"block.0": (1.0, None)}


def test_matching_steps_follow_the_observed_pairs():
    # The output changes once, between steps 3 and 4.
    watching = observer(gaps=(1, 2, 3, 4))
    for step in range(10):
        watching(event(step, random_output(int(step > 3))))
    found = watching.summary()
    assert found.matching_steps(1.0).steps == (0, 3, 4, 8)
    assert found.matching_steps(0.0).steps == (0, 4, 8)


def test_the_summary_is_plain():
    watching = observer()
    for step in range(3):
        watching(event(step, random_output(step)))
    found = watching.summary().to_dict()
    assert json.loads(json.dumps(found))["persistence"] == [list(row) for row in found["persistence"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 0.8}, "ratio is 0.8"),
        ({"gaps": ()}, "gaps are"),
        ({"gaps": (2, 1)}, "gaps are"),
        ({"gaps": (0, 1)}, "gaps are"),
        ({"num_pairs": 1}, "num_pairs is 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        observer(**wrong)


def test_an_observer_that_saw_nothing_says_so():
    with pytest.raises(ValueError, match="nothing was observed"):
        observer().summary()


@pytest.fixture(scope="module")
def flux():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=6,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        ).eval()


@torch.no_grad()
def denoise(flux, *, steps=4, size=6):
    """An Euler loop; returns the last state."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, size * size, 4, generator=generator)
    text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((3, 12), (6,)))
    grid = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    for step in range(steps):
        t = 1 - step / steps
        velocity = flux(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), t),
            img_ids=torch.cat([torch.zeros(len(grid), 1), grid], 1),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
        x = x - velocity / steps
    return x


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_transformer_is_watched_and_left_as_it_was(flux, scope):
    dense = denoise(flux)
    with observe_outputs(flux, gaps=(1, 2), scope=scope) as observed:
        watched = denoise(flux)
    assert torch.equal(watched, dense)
    assert torch.equal(denoise(flux), dense)
    found = observed.summary()
    assert found.num_steps == 4
    assert len(found.sites) == 3
    assert all(name.endswith(".attn") == (scope == "attn") for name in found.sites)
    assert all(0 <= value <= 1 for row in found.pair_match_ratio for value in row)
    assert all(math.isfinite(value) and value >= 0 for value in found.random_error)


def test_two_generations_are_averaged(flux):
    with observe_outputs(flux, gaps=(1,)) as once:
        denoise(flux)
    with observe_outputs(flux, gaps=(1,)) as twice:
        denoise(flux)
        denoise(flux)
    assert twice.summary() == once.summary()


def test_a_transformer_is_left_as_it_was_after_an_error(flux):
    dense = denoise(flux)
    with pytest.raises(RuntimeError, match="stopped"), observe_outputs(flux):
        raise RuntimeError("stopped")
    assert torch.equal(denoise(flux), dense)
