import pytest
import torch

from wellposed.evaluation.agreement import class_agreement


def test_share_and_its_error():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    agreement = class_agreement(logits, labels)
    assert agreement.value == 0.75
    assert agreement.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert str(agreement) == "0.75 +- 0.22"


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one"):
        class_agreement(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
