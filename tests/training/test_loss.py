"""The summed cross-entropy is that of torch on float32 logits, and keeps none of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft.training import loss
from sft.training.memory import LiveBytes


def found(logits, labels, summed):
    given = logits.clone().requires_grad_()
    value = summed(given, labels) / 7  # so that the gradient that comes in is not 1
    value.backward()
    torch.testing.assert_close(given.detach(), logits, rtol=0, atol=0, equal_nan=True)  # they are not written to
    return value.detach(), given.grad


def torchs(logits, labels):
    return cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("entries", [1, 600, 2**20])  # a row at a time, two rows of 257, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_float32_logits(dtype, entries, monkeypatch):
    monkeypatch.setattr(loss, "ENTRIES_ON_CPU", entries)
    torch.manual_seed(0)
    logits = (8 * torch.randn(9, 257)).to(dtype)
    labels = torch.randint(257, (9,))
    labels[[0, 4, 8]] = -100
    value, gradient = found(logits, labels, loss.summed_cross_entropy)
    expected, right = found(logits, labels, torchs)
    assert value.dtype is torch.float32 and gradient.dtype is dtype
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not gradient[[0, 4, 8]].any() and gradient[1].any()


def test_without_a_label_loss_and_gradient_are_zero():
    value, gradient = found(torch.randn(3, 11), torch.full((3,), -100), loss.summed_cross_entropy)
    assert value == 0 and not gradient.any()


def test_logits_that_are_no_numbers_count_where_there_is_a_label_and_nowhere_else():
    logits = torch.randn(3, 11)
    logits[1, 2] = torch.nan
    value, gradient = found(logits, torch.tensor([1, 2, 3]), loss.summed_cross_entropy)
    assert value.isnan() and gradient[1].isnan().all() and not gradient[0].isnan().any()
    value, gradient = found(logits, torch.tensor([1, -100, 3]), loss.summed_cross_entropy)
    assert value > 0 and not gradient.isnan().any() and not gradient[1].any()


def test_beside_logits_of_bfloat16_only_their_gradient_is_kept(monkeypatch):
    monkeypatch.setattr(loss, "ENTRIES_ON_CPU", 1000)
    logits = torch.randn(100, 1000).bfloat16().requires_grad_()
    labels = torch.randint(1000, (100,))
    peaks = []
    for summed in (loss.summed_cross_entropy, torchs):
        with LiveBytes() as memory:
            _ = logits.view_as(logits)  # which it would count with what is made
            memory.live = 0
            summed(logits, labels).backward()
        peaks.append(memory.peak / logits.nbytes)
        logits.grad = None
    assert 1 <= peaks[0] < 1.1
    assert peaks[1] > 4, "this test would see a float32 copy"
