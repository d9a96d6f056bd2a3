import pytest
import torch

from wellposed.evaluation.features import FeatureExtractor, SmallConvNet, hash_weights, unit_images


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small_net(**kwargs):
    net = SmallConvNet(1, 10, feature_dim=16, width=8, **kwargs)
    generator = seeded(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return net


@pytest.mark.parametrize("size", [8, 16, 28, 33])
def test_any_size_gives_logits_and_features(size):
    images = torch.rand(3, 1, size, size, generator=seeded(0))
    assert small_net()(images).shape == (3, 10)
    assert small_net().features(images).shape == (3, 16)


def test_features_do_not_depend_on_the_batch():
    net, images = small_net(), torch.rand(5, 1, 8, 8, generator=seeded(0))
    alone = torch.cat([net.features(image[None]) for image in images])
    torch.testing.assert_close(net.features(images), alone, rtol=1e-5, atol=1e-6)


def test_time_enters_and_only_where_it_should():
    net, images = small_net(time_conditional=True), torch.rand(2, 1, 8, 8, generator=seeded(0))
    early, late = (net(images, torch.full((2,), t)) for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-3
    mixed = net(images, torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1]]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pass the time"):
        net(images)
    with pytest.raises(ValueError, match="leave out t"):
        small_net()(images, torch.zeros(2))
    with pytest.raises(ValueError, match="clean images"):
        net.extractor("noised")


def test_time_classifier_has_a_gradient_for_guidance():
    net, x_t = small_net(time_conditional=True), torch.rand(2, 1, 8, 8, generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x_t, torch.full((2,), 0.5)).log_softmax(1)[:, 3].sum(), x_t)
    assert gradient.abs().sum() > 0


def test_learns_the_digits():
    from wellposed.data.bundled import digits

    train, test = digits(split="train"), digits(split="test")
    everything, held_out = train.batch(range(len(train))), test.batch(range(len(test)))
    net = SmallConvNet(1, 10, width=8)
    generator = seeded(0)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight, generator=generator)
                layer.bias.zero_()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(150):
        chosen = torch.randint(len(train), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(net(everything.images[chosen]), everything.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        correct = net(held_out.images).argmax(1) == held_out.labels
    assert correct.double().mean() > 0.88


def test_extractor_takes_unit_images():
    net, images = small_net(), torch.rand(4, 1, 8, 8, generator=seeded(0))
    features = net.extractor("small")(images)
    torch.testing.assert_close(features, net.features(2 * images - 1))
    assert not features.requires_grad
    assert net.extractor("small").weights_hash == hash_weights(net)


def test_eight_bit_images_are_what_a_saved_picture_holds():
    extractor = FeatureExtractor(function=lambda x: x.flatten(1), name="pixels", weights_hash="")
    images = torch.rand(4, 1, 8, 8, generator=seeded(0))
    levels = extractor(images, image_format="8-bit") * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (levels / 255 - images.flatten(1)).abs().max() <= 0.5 / 255 + 1e-6
    torch.testing.assert_close(extractor(images), images.flatten(1), rtol=0, atol=0)


def test_unpooled_features_are_refused():
    extractor = FeatureExtractor(function=lambda x: x, name="forgot to pool", weights_hash="")
    with pytest.raises(ValueError, match="pool and flatten"):
        extractor(torch.zeros(2, 1, 4, 4))


def test_hash_sees_every_weight_and_no_order():
    net = small_net()
    before = hash_weights(net)
    assert before == hash_weights(small_net())
    with torch.no_grad():
        net.to_logits.bias[0] += 1e-7
    assert hash_weights(net) != before
    assert hash_weights(small_net().double()) != before


def test_unit_images_undoes_the_model_scale():
    images = torch.tensor([-1.2, -1.0, 0.0, 1.0, 3.0])
    torch.testing.assert_close(unit_images(images), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
