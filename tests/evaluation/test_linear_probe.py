import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from wellposed.evaluation.linear_probe import fit_linear_probe


def data(n=300, dim=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    features = centres[labels] + torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return features * torch.arange(1, dim + 1) + 3, labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_agrees_with_scikit_learn(l2):
    features, labels = data()
    probe = fit_linear_probe(features, labels, num_classes=4, l2=l2, tolerance=1e-7)
    z = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    # The penalty makes the objective l2-convex, so that a gradient g leaves W within |g| / l2 of the optimum.
    expected = LogisticRegression(C=1 / (l2 * len(z)), tol=1e-10, max_iter=5000).fit(z, labels.numpy())
    torch.testing.assert_close(probe.weight, torch.from_numpy(expected.coef_), rtol=0, atol=5e-7 / l2)
    torch.testing.assert_close(
        probe.bias - probe.bias.mean(),
        torch.from_numpy(expected.intercept_ - expected.intercept_.mean()),
        rtol=0,
        atol=5e-7 / l2,
    )
    held_out, truth = data(seed=1)
    accuracy = probe.accuracy(held_out, truth)
    assert 0.6 < accuracy.value < 1
    assert accuracy.standard_error == pytest.approx((accuracy.value * (1 - accuracy.value) / 300) ** 0.5)


def test_the_gradient_vanishes():
    features, labels = data()
    probe = fit_linear_probe(features, labels, num_classes=4, l2=1e-2, tolerance=1e-7)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    z = (features - features.mean(0)) / features.std(0, correction=0)
    loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, labels) + 1e-2 / 2 * weight.square().sum()
    loss.backward()
    largest = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    assert largest < 1.1e-7
    assert probe.gradient == pytest.approx(largest, abs=1e-13)
    assert probe.bias.sum().abs() < 1e-12


def test_predicted_shares_are_those_of_the_training_set():
    # The bias carries no penalty, so its equations hold at any l2.
    features, labels = data()
    features, labels = features[30:], labels[30:].clamp(max=2)
    for l2 in (1e-3, 1e3):
        probe = fit_linear_probe(features, labels, num_classes=3, l2=l2, tolerance=1e-7)
        shares = probe.logits(features).softmax(1).mean(0)
        torch.testing.assert_close(shares, labels.bincount().double() / len(labels), rtol=0, atol=1e-7)
    assert probe.weight.abs().max() < 1e-3


def test_scale_and_offset_of_each_feature_do_not_matter():
    features, labels = data()
    held_out, _ = data(seed=1)
    probe = fit_linear_probe(features, labels, num_classes=4, tolerance=1e-7)
    factor = torch.tensor([1e-6, 1e6, -1.0, 2.0, 1.0, 30.0], dtype=torch.float64)
    moved = fit_linear_probe(features * factor + 5, labels, num_classes=4, tolerance=1e-7)
    torch.testing.assert_close(moved.logits(held_out * factor + 5), probe.logits(held_out), rtol=0, atol=1e-4)


def test_constant_features_are_ignored():
    features, labels = data()
    constant = torch.full((300, 2), 0.1, dtype=torch.float64)
    probe = fit_linear_probe(torch.cat([features, constant], 1), labels, num_classes=4, tolerance=1e-7)
    assert probe.scale[-2:].tolist() == [1.0, 1.0]
    alone = fit_linear_probe(features, labels, num_classes=4, tolerance=1e-7)
    torch.testing.assert_close(probe.weight[:, :-2], alone.weight, rtol=0, atol=1e-4)
    assert probe.weight[:, -2:].abs().max() < 1e-7


def test_renumbered_classes_and_repeated_runs():
    features, labels = data()
    first, again = (fit_linear_probe(features.float(), labels, num_classes=4) for _ in range(2))
    assert first.weight.dtype == torch.float64
    assert torch.equal(first.weight, again.weight)
    order = torch.tensor([2, 0, 3, 1])
    renamed = fit_linear_probe(features.float(), order[labels], num_classes=4)
    torch.testing.assert_close(renamed.weight[order], first.weight, rtol=0, atol=1e-4)


def test_separable_classes_and_labels_of_chance():
    labels = torch.arange(40) % 2
    features = torch.stack([labels.double() + 5, torch.ones(40)], 1)
    assert fit_linear_probe(features, labels, num_classes=2).accuracy(features, labels).value == 1.0
    same = torch.ones(40, 2)
    assert fit_linear_probe(same, labels, num_classes=2).accuracy(same, labels).value == 0.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode):
    features, labels = data()
    expected = fit_linear_probe(features, labels, num_classes=4)
    with mode():
        probe = fit_linear_probe(features.clone(), labels, num_classes=4)
        accuracy = probe.accuracy(features, labels)
    assert torch.equal(probe.weight, expected.weight)
    assert accuracy == expected.accuracy(features, labels)
    assert not probe.weight.requires_grad
    assert probe.weight.grad is None


def test_says_when_it_stopped_early():
    features, labels = data()
    with pytest.warns(RuntimeWarning, match="raise max_iterations"):
        probe = fit_linear_probe(features, labels, num_classes=4, max_iterations=2)
    assert probe.gradient > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_linear_probe(features, labels, num_classes=4)


def test_bad_input():
    features, labels = data()
    with pytest.raises(ValueError, match="no features of class 4"):
        fit_linear_probe(features, labels, num_classes=5)
    with pytest.raises(ValueError, match="labels span 0 to 3; with 3 classes"):
        fit_linear_probe(features, labels, num_classes=3)
    with pytest.raises(ValueError, match="labels span -1"):
        fit_linear_probe(features, labels - 1, num_classes=4)
    with pytest.raises(ValueError, match="NaN"):
        fit_linear_probe(features / 0, labels, num_classes=4)
    with pytest.raises(ValueError, match="at least one"):
        fit_linear_probe(features[:0], labels[:0], num_classes=4)
    for wrong in ({"l2": 0.0}, {"max_iterations": 0}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            fit_linear_probe(features, labels, num_classes=4, **wrong)
    with pytest.raises(ValueError, match="length 2; the probe was fitted on 6"):
        fit_linear_probe(features, labels, num_classes=4).logits(features[:, :2])
