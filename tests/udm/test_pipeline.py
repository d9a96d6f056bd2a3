"""The pipeline: prompts and holes become canvases, and the room's sampler writes on them."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from tokenizers import processors
from torch import Tensor, nn

from wellposed.batches import TextBatch
from wellposed.data.tokenizers import byte_tokenizer, train_bpe
from wellposed.models import UniformDiffusionTransformerModel
from wellposed.pipelines import UniformDiffusionPipeline
from wellposed.schedulers import UniformDiffusionScheduler
from wellposed.udm import sample
from wellposed.udm.kernels import TokenState
from wellposed.udm.models import NetworkModel
from wellposed.udm.pipeline import prompt_canvas
from wellposed.udm.remasking import Remasking

NETWORKS: dict[str, dict[str, Any]] = {
    "uniform": {"given_embedding": True},
    "maximal_coupling": {"prediction_kind": "denoiser", "given_embedding": True},
    "masked": {"mask_token": True, "time_conditioning": False},
    "absorbing": {"absorbing_fusion": "separate_linear", "prediction_kind": "denoiser"},
    "refreshed_absorbing": {"absorbing_fusion": "shared_mlp", "prediction_kind": "denoiser"},
}
FUNCTION = "def area(r):\n    return ____ * r ** 2"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(vocab_size: int = 256, **config: Any) -> UniformDiffusionTransformerModel:
    """Small, and as far from its zero start as a trained one; float64, in which row-wise heads are exact enough."""
    net = UniformDiffusionTransformerModel(
        vocab_size=vocab_size, num_layers=1, num_attention_heads=2, attention_head_dim=4, cond_dim=8, **config
    )
    generator = seeded()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net.double().eval()


def pipeline(kernel: str = "uniform", **scheduler: Any) -> UniformDiffusionPipeline:
    pipe = UniformDiffusionPipeline(
        network(**NETWORKS[kernel]), UniformDiffusionScheduler(kernel=kernel, **scheduler), byte_tokenizer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_hole_is_filled_and_the_rest_stays_letter_for_letter() -> None:
    pipe = pipeline()
    out = pipe(FUNCTION, num_inference_steps=5, corrector_steps=2, generator=seeded())
    before, after = FUNCTION.split("____")
    text = out.texts[0]
    assert text.startswith(before) and text.endswith(after)
    assert len(out.ids[0]) == len(before) + 8 + len(after)
    assert out.evaluations == 5 + 2 * 4
    again = pipe(FUNCTION, num_inference_steps=5, corrector_steps=2, generator=seeded())
    assert again.texts == out.texts
    assert pipe(FUNCTION, num_inference_steps=5, corrector_steps=2, generator=seeded(1)).texts != out.texts


@pytest.mark.parametrize("spacing", ["linear", "geometric"])
@pytest.mark.parametrize("kernel", NETWORKS)
def test_a_loop_of_ones_own_writes_the_same(kernel: str, spacing: Any) -> None:
    """Full logits, ``scheduler.step`` and ``step_correct``: what the pipeline does on the rows that it needs."""
    corrector = {"corrector_steps": 2, "corrector_k": 3} if kernel in ("uniform", "maximal_coupling") else {}
    pipe = pipeline(kernel, timestep_spacing=spacing, temperature=0.8, top_p=0.95, **corrector)
    prompts = ["a ____ b", "____c____dd"]
    expected = pipe(prompts, tokens_per_hole=4, num_inference_steps=6, generator=seeded())

    net, scheduler = pipe.transformer, pipe.scheduler
    canvas = prompt_canvas(pipe.tokenizer, prompts, tokens_per_hole=4)
    masks = {"given": canvas.given, "valid": canvas.valid}
    known = {"given": canvas.given} if net.config.given_embedding else {}
    generator = seeded()
    state = scheduler.kernel(256).prior(canvas.tokens, generator=generator, given=canvas.given)

    def logits(alpha: Tensor) -> Tensor:
        noise = {} if state.noise is None else {"noise_ids": state.noise}
        with torch.no_grad():
            return net(state.tokens, alpha.expand(2), attention_mask=canvas.valid, **noise, **known).logits

    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        after = scheduler.step(
            logits(scheduler.alpha(t)), t, state.tokens, generator=generator, noise_tokens=state.noise, **masks
        )
        state = TokenState(tokens=after.prev_sample, noise=after.prev_noise)
        for _ in range(scheduler.config.corrector_steps if scheduler.alpha_after(t) < 1 else 0):
            new = logits(scheduler.alpha_after(t))
            corrected = scheduler.step_correct(new, t, state.tokens, generator=generator, **masks)
            state = TokenState(tokens=corrected.prev_sample)
    valid = torch.ones_like(state.tokens, dtype=torch.bool) if canvas.valid is None else canvas.valid
    found = [row[inside] for row, inside in zip(state.tokens, valid, strict=True)]
    assert [row.tolist() for row in found] == [row.tolist() for row in expected.ids]


def test_canvases() -> None:
    tokenizer = byte_tokenizer()
    first, second = "ab____c", "____"
    canvas = prompt_canvas(tokenizer, [first, second], tokens_per_hole=2)
    assert canvas.given is not None and canvas.valid is not None
    assert canvas.tokens.tolist() == [[97, 98, 0, 0, 99], [0, 0, 0, 0, 0]]
    assert canvas.given.int().tolist() == [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert canvas.valid.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # A prefix, a suffix, both with a length; several holes with sizes of their own.
    for prompts, options, given in (
        (["ab"], {"length": 4}, [[1, 1, 0, 0]]),
        (["____ab"], {"tokens_per_hole": 1}, [[0, 1, 1]]),
        (["a____b"], {"tokens_per_hole": 1, "length": 5}, [[1, 0, 1, 0, 0]]),
        (["a____b____"], {"tokens_per_hole": [1, 2]}, [[1, 0, 1, 0, 0]]),
        (["____a", "a____b____"], {"tokens_per_hole": [[3], [1, 1]]}, [[0, 0, 0, 1], [1, 0, 1, 0]]),
        (["a<>b"], {"hole": "<>", "tokens_per_hole": 1}, [[1, 0, 1]]),
        (["____"], {"hole": None, "length": 5}, [[1, 1, 1, 1, 0]]),
    ):
        canvas = prompt_canvas(tokenizer, prompts, **options)
        assert canvas.given is not None
        assert canvas.given.int().tolist() == given
        assert canvas.valid is None


def test_pieces_are_tokenized_one_by_one() -> None:
    tokenizer = train_bpe(["def area(r):\n    return 3 * r ** 2\n"] * 3, 270, special_tokens=("bos", "eos"))
    canvas = prompt_canvas(tokenizer, [FUNCTION])
    assert canvas.given is not None
    before, after = (tokenizer.encode(piece, add_special_tokens=False) for piece in FUNCTION.split("____"))
    assert canvas.tokens[0][canvas.given[0]].tolist() == before + after
    assert int((~canvas.given).sum()) == 8
    assert "".join(map(tokenizer.decode, (before, after))) == FUNCTION.replace("____", "")


def test_a_tokenizer_that_adds_special_tokens_adds_none_to_the_pieces() -> None:
    tokenizer = byte_tokenizer(special_tokens=("bos",))
    template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer.encode("a") == [256, 97]
    canvas = prompt_canvas(tokenizer, ["a____b"], tokens_per_hole=1)
    assert canvas.tokens.tolist() == [[97, 0, 98]]


def test_texts_of_different_length_do_not_see_each_others_padding() -> None:
    pipe = pipeline()
    long, short = "abc____defgh____", "x____"
    both = pipe([long, short], num_inference_steps=4, generator=[seeded(1), seeded(2)])
    alone = pipe(long, num_inference_steps=4, generator=seeded(1))
    assert both.ids[0].tolist() == alone.ids[0].tolist()
    assert both.texts[1][0] == "x"
    assert [len(ids) for ids in both.ids] == [24, 9]


def test_every_text_has_a_generator_of_its_own() -> None:
    pipe = pipeline()
    seeds = (3, 4, 5, 6)
    every = pipe(["ab", "cd"], length=9, num_texts_per_prompt=2, num_inference_steps=3, generator=[*map(seeded, seeds)])
    assert [text[:2] for text in every.texts] == ["ab", "ab", "cd", "cd"]
    for index, prompt in enumerate(("ab", "ab", "cd", "cd")):
        alone = pipe(prompt, length=9, num_inference_steps=3, generator=[seeded(seeds[index])])
        assert alone.texts == [every.texts[index]]


def test_texts_from_nothing_and_ids_without_a_tokenizer() -> None:
    pipe = UniformDiffusionPipeline(network(12), UniformDiffusionScheduler())
    pipe.set_progress_bar_config(disable=True)
    out = pipe(length=7, num_texts_per_prompt=3, num_inference_steps=2, output_type="ids", generator=seeded())
    assert out.texts is None
    ids = torch.stack(out.ids)
    assert ids.shape == (3, 7) and ids.max() < 12
    assert pipe(length=7, num_inference_steps=2, output_type="ids", return_dict=False, generator=seeded())[2] == 2


def test_tokens_may_be_given_anywhere() -> None:
    pipe = pipeline()
    tokens = torch.randint(256, (2, 9), generator=seeded(1))
    mask = torch.rand(2, 9, generator=seeded(2)) < 0.5
    out = pipe(given_tokens=tokens, given_mask=mask, num_inference_steps=3, output_type="ids", generator=seeded())
    ids = torch.stack(out.ids)
    assert torch.equal(ids[mask], tokens[mask])
    assert not torch.equal(ids[~mask], tokens[~mask])
    # What stands at the other positions says nothing.
    other = torch.where(mask, tokens, 10_000)
    again = pipe(given_tokens=other, given_mask=mask, num_inference_steps=3, output_type="ids", generator=seeded())
    assert torch.equal(torch.stack(again.ids), ids)


def test_the_network_is_told_what_is_given_and_what_is_padding() -> None:
    """The sampler would keep given tokens in place anyway; that they are known the network has to be told."""
    pipe = pipeline()
    heard: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, inputs: heard.append(inputs), with_kwargs=True)
    pipe(["ab____", "____"], num_inference_steps=3, tokens_per_hole=1)
    assert len(heard) == 3
    for inputs in heard:
        assert inputs["given"].tolist() == [[True, True, False], [False, False, False]]
        assert inputs["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
        assert inputs["rows"].tolist() == [[False, False, True], [True, False, False]]
        assert inputs["input_ids"][0, :2].tolist() == [97, 98]
    heard.clear()
    pipe(length=3, num_inference_steps=1)
    assert not {"given", "attention_mask", "noise_ids"} & set(heard[0])


@pytest.mark.parametrize("kernel", NETWORKS)
def test_a_network_that_cannot_tell_given_tokens_is_warned_of(kernel: str) -> None:
    config = {**NETWORKS[kernel], "given_embedding": False}
    pipe = UniformDiffusionPipeline(network(**config), UniformDiffusionScheduler(kernel=kernel), byte_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    if kernel in ("uniform", "maximal_coupling"):
        with pytest.warns(UserWarning, match="given_embedding=True"):
            text = pipe("ab____", num_inference_steps=2, generator=seeded()).texts[0]
    else:
        text = pipe("ab____", num_inference_steps=2, generator=seeded()).texts[0]
    assert text.startswith("ab")
    assert len(pipe(length=4, num_inference_steps=2).texts) == 1


def test_a_budget_of_evaluations_is_kept() -> None:
    pipe = pipeline()
    for budget in (1, 2, 9, 10):
        out = pipe(length=5, evaluations=budget, corrector_steps=2, corrector_k=1, generator=seeded())
        assert out.evaluations == budget
    assert pipe.num_timesteps == 4  # 10 = 4 steps, 3 of which are corrected twice


def test_options_of_a_call_leave_the_scheduler_alone() -> None:
    pipe = pipeline(corrector_steps=1)
    before = dict(pipe.scheduler.config)
    cold = pipe(length=30, num_inference_steps=3, temperature=0.01, top_k=5, min_p=0.1, corrector_steps=0).evaluations
    assert cold == 3
    assert dict(pipe.scheduler.config) == before
    assert pipe(length=30, num_inference_steps=3).evaluations == 3 + 2


@pytest.mark.parametrize(
    "options",
    [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 0.99}, {"temperature": 1e-3}],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_sampler(options: dict[str, Any]) -> None:
    """All that narrows the draw down makes a masked chain of one step greedy."""
    pipe = pipeline("masked")
    greedy = pipe(length=20, num_inference_steps=1, output_type="ids", **options).ids[0]
    with torch.no_grad():
        logits = pipe.transformer(torch.full((1, 20), 256), torch.ones(1)).logits
    assert torch.equal(greedy, logits[0].argmax(-1))


def test_revision_and_the_confidence_strategy_are_the_rooms() -> None:
    canvas = TextBatch(tokens=torch.zeros(2, 12, dtype=torch.long))
    call: dict[str, Any] = {"length": 12, "num_texts_per_prompt": 2, "num_inference_steps": 5, "output_type": "ids"}

    def expected(pipe: UniformDiffusionPipeline, alphas: Tensor, **options: Any) -> Tensor:
        kernel = pipe.scheduler.kernel(256)
        model = NetworkModel(network=pipe.transformer, kind="leave_one_out", channel=kernel.channel, knows_given=False)
        return sample(model, kernel, canvas, alphas, generator=seeded(), **options)[0]

    pipe = pipeline("masked")
    remasking = Remasking(schedule="rescale", eta=0.5)
    plan = remasking.plan(5)
    found = torch.stack(pipe(**call, remasking=remasking, generator=seeded()).ids)
    assert torch.equal(found, expected(pipe, plan.alphas, sigmas=plan.sigmas))
    assert not torch.equal(found, torch.stack(pipe(**call, generator=seeded()).ids))

    pipe = pipeline()
    found = torch.stack(pipe(**call, strategy="confidence", generator=seeded()).ids)
    assert torch.equal(found, expected(pipe, pipe.scheduler.alphas, strategy="confidence"))


def test_callback_sees_every_step_may_change_the_tokens_and_may_stop() -> None:
    pipe = pipeline("masked")
    seen: list[tuple[int, float]] = []

    def watch(own: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep)))
        own._interrupt = step == 1
        return {"tokens": tensors["tokens"].index_fill(1, torch.tensor([0]), 65)}

    out = pipe(length=30, num_inference_steps=4, callback_on_step_end=watch, generator=seeded())
    assert seen == [(0, 1.0), (1, 0.75)]
    assert pipe.num_timesteps == 4 and out.evaluations == 2
    assert out.ids[0][0] == 65
    assert (out.ids[0] == 256).any(), "half way some tokens are masks still"
    assert out.texts[0].startswith("A")
    # And the next call starts afresh.
    assert (pipe(length=30, num_inference_steps=4, generator=seeded()).ids[0] < 256).all()

    def nothing(own: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        assert tensors == {}

    pipe(
        length=3,
        num_inference_steps=2,
        callback_on_step_end=nothing,
        callback_on_step_end_tensor_inputs=[],
    )


def test_progress_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(length=3, num_inference_steps=3, corrector_steps=1)
    assert "3/3" in capsys.readouterr().err


def test_a_folder_holds_the_pipeline(tmp_path: Path) -> None:
    pipe = pipeline("absorbing", temperature=0.9)
    pipe.save_pretrained(tmp_path)
    again = UniformDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    first, second = (one(FUNCTION, num_inference_steps=4, generator=seeded()) for one in (pipe, again))
    assert first.texts == second.texts


def test_the_network_says_what_its_logits_are() -> None:
    net = network(prediction_kind="denoiser")
    scheduler = UniformDiffusionScheduler(temperature=0.5)
    pipe = UniformDiffusionPipeline(net, scheduler)
    assert (pipe.scheduler.config.prediction_kind, pipe.scheduler.config.temperature) == ("denoiser", 0.5)
    assert scheduler.config.prediction_kind == "leave_one_out"
    stock = UniformDiffusionPipeline(net, DiscreteDDIMScheduler(corrector_steps=3))
    assert isinstance(stock.scheduler, UniformDiffusionScheduler)
    assert stock.scheduler.corrector is not None and stock.scheduler.corrector.steps == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (network(), UniformDiffusionScheduler(), byte_tokenizer(special_tokens=("eos",))), "has 257 tokens"),
        (lambda: (network(300), UniformDiffusionScheduler(), byte_tokenizer()), "transformer writes 300"),
        (lambda: (network(), UniformDiffusionScheduler(vocab_size=300)), "vocab_size is 300"),
        (lambda: (network(), UniformDiffusionScheduler(kernel="masked")), "mask_token=True"),
        (lambda: (network(), UniformDiffusionScheduler(kernel="absorbing")), "absorbing_fusion is None"),
        (
            lambda: (network(absorbing_fusion="shared_mlp"), UniformDiffusionScheduler()),
            "kernel is 'uniform' and the network's absorbing_fusion is 'shared_mlp'",
        ),
    ],
)
def test_components_that_do_not_fit_are_refused(build: Callable[[], tuple[Any, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformDiffusionPipeline(*build())


GIVEN = torch.zeros(1, 4, dtype=torch.long)
MASK = torch.tensor([[True, True, False, False]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass length"),
        ({"prompt": []}, "pass at least one"),
        ({"prompt": "abc"}, "leaves nothing to write"),
        ({"prompt": ["a____", "abc"]}, "prompt 1 leaves nothing to write"),
        ({"prompt": "abc____", "length": 5}, "takes 11 tokens with its holes, more than length=5"),
        ({"prompt": "a____b____", "tokens_per_hole": [1]}, "has 1 numbers, prompt 0 has 2 holes"),
        ({"prompt": ["____", "____"], "tokens_per_hole": [[1]]}, "has 1 lists for 2 prompts"),
        ({"prompt": "____", "tokens_per_hole": 0}, "at least 1 token"),
        ({"length": 0}, "length is 0"),
        ({"length": 3, "num_texts_per_prompt": 0}, "num_texts_per_prompt is 0"),
        ({"length": 3, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"length": 3, "evaluations": 0}, "budget is 0"),
        ({"length": 3, "generator": [torch.Generator()] * 2}, "2 generators for 1 texts"),
        ({"length": 3, "callback_on_step_end_tensor_inputs": ["logits"]}, "got also logits"),
        ({"length": 3, "temperature": 0}, "temperature is 0"),
        ({"length": 3, "remasking": Remasking()}, "revises by itself"),
        ({"given_tokens": GIVEN}, "belong together"),
        ({"given_tokens": GIVEN, "given_mask": MASK, "prompt": "a"}, "say the same thing twice"),
        ({"given_tokens": GIVEN, "given_mask": MASK, "length": 5}, "are 4 long, length is 5"),
        ({"given_tokens": GIVEN, "given_mask": MASK.expand(2, -1).clone()}, "with the shape of given_tokens"),
        ({"given_tokens": GIVEN + 256, "given_mask": MASK}, r"must lie in 0\.\.255"),
        ({"given_tokens": GIVEN, "given_mask": MASK | True}, "leaves nothing to write"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**options)


def test_more_that_is_refused() -> None:
    with pytest.raises(ValueError, match="linear"):
        pipeline("masked", timestep_spacing="geometric")(length=3, remasking=Remasking())
    bare = UniformDiffusionPipeline(network(), UniformDiffusionScheduler())
    with pytest.raises(ValueError, match="write output_type='ids'"):
        bare(length=3)
    with pytest.raises(ValueError, match="no tokenizer to read a prompt"):
        bare("a____", output_type="ids")


def test_all_arguments_are_optional() -> None:
    parameters = inspect.signature(UniformDiffusionPipeline.__call__).parameters
    assert all(p.default is not inspect.Parameter.empty for name, p in parameters.items() if name != "self")
    assert set(UniformDiffusionPipeline._callback_tensor_inputs) == {"tokens"}


@pytest.mark.gpu
def test_on_a_device_with_generators_of_either_kind() -> None:
    """Draws come from the generator's own device, so a CPU generator writes what it writes on the CPU."""
    pipe = pipeline(timestep_spacing="geometric", corrector_steps=1, corrector_k=2)
    prompts = [FUNCTION, "a____"]
    here = pipe(prompts, num_inference_steps=4, generator=seeded())
    pipe.to("cuda")
    there = pipe(prompts, num_inference_steps=4, generator=seeded())
    assert [ids.tolist() for ids in there.ids] == [ids.tolist() for ids in here.ids]
    assert there.ids[0].device.type == "cuda"
    own = torch.Generator("cuda").manual_seed(0)
    assert pipe(prompts, num_inference_steps=4, generator=own).texts[1].startswith("a")
