"""Exports load with from_pretrained and never leave half a folder."""

import pytest
import torch
from diffusers import UNet2DModel

from wellposed.training import ExportPretrained, export_pretrained, replaced_folder, train


def unet(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(4,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=2,
            add_attention=False,
        ).double()


def denoise(models, batch, context):
    x = batch.reshape(-1, 1, 2, 2)
    return models[context.player](x, torch.zeros(len(x)), return_dict=False)[0].square().mean(), {}


def same_weights(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name].to(a[name].dtype)) for name in a)


def test_an_export_is_what_was_trained(toy, tmp_path):
    player = toy.player(model=unet(), objective=denoise, ema_decay=0.9)
    result = train(player, toy.data(), toy.config(max_steps=3), tmp_path / "run")
    export_pretrained(player.model, tmp_path / "own")
    export_pretrained(player.model, tmp_path / "averaged", average=result.averages["net"])
    own = UNet2DModel.from_pretrained(tmp_path / "own", dtype=torch.float64)
    averaged = UNet2DModel.from_pretrained(tmp_path / "averaged", dtype=torch.float64)
    assert same_weights(player.model, own)
    assert not same_weights(player.model, averaged)
    result.averages["net"].copy_to_model()
    assert same_weights(player.model, averaged)
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_sharded_model_is_exported_whole(toy, on_ranks, tmp_path):
    def work():
        player = toy.player(model=unet(), objective=denoise, ema_decay=0.9)
        export = ExportPretrained("net", tmp_path / "sharded")
        config = toy.config(max_steps=3, sharding="fsdp2")
        train(player, toy.data(), config, tmp_path / "run", callbacks=[export])

    on_ranks(2, work)
    player = toy.player(model=unet(), objective=denoise, ema_decay=0.9)
    result = train(player, toy.data(), toy.config(max_steps=3), tmp_path / "one")
    result.averages["net"].copy_to_model()
    exported = UNet2DModel.from_pretrained(tmp_path / "sharded", dtype=torch.float64)
    for (name, a), b in zip(player.model.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_a_failed_export_keeps_the_previous_one(tmp_path):
    model = unet()
    export_pretrained(model, tmp_path / "export")
    broken = unet(seed=1)

    def fail(folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    broken.save_pretrained = fail
    with pytest.raises(OSError, match="No space"):
        export_pretrained(broken, tmp_path / "export")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert same_weights(model, UNet2DModel.from_pretrained(tmp_path / "export"))


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "folder") as fresh:
            (fresh / content).write_text(content)
            assert not (tmp_path / "folder" / content).exists()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_model_without_a_configuration_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="derive it from diffusers' ModelMixin"):
        export_pretrained(toy.network(), tmp_path / "export")
