"""Distributions: two-hot scalars, unimix categoricals, draws."""

import pytest
import torch
from torch.nn import functional as F

from worldmodel import TwoHot
from worldmodel.heads import (
    balanced_kl,
    chosen,
    cross_entropy,
    kl,
    race,
    sample,
    softmax,
    softmax_back,
    unimix,
)


def test_two_hot_starts_at_zero_and_its_loss_is_minimal_at_the_target():
    torch.manual_seed(0)
    head = TwoHot(4, 8, 1)
    x = torch.randn(5, 4)
    assert torch.equal(head.mean(head(x)), torch.zeros(5))
    target = torch.tensor([-300.0, -1.0, 0.0, 0.4, 5000.0])
    logits = torch.zeros(5, 255, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(logits, target).sum().backward()
        optimizer.step()
    assert torch.allclose(head.mean(logits), target, rtol=0.01, atol=0.01)


def test_two_hot_rows_are_whole_registers_whose_last_places_nobody_chooses():
    head = TwoHot(4, 8, 1, bins=41)
    torch.nn.init.normal_(head.net.out.weight)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    logits = head(x)
    assert logits.shape == (6, 48)
    assert logits[:, 41:].isneginf().all()
    plain = head.net.out(head.net.hidden(x))
    assert torch.allclose(logits[:, :41], plain, atol=1e-6)
    probs = plain.softmax(-1)
    assert torch.allclose(head.mean(logits), (probs * head.bins).sum(-1), rtol=1e-4)
    head.loss(logits, torch.randn(6)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_two_hot_values_of_many_rows_are_those_of_few():
    head = TwoHot(4, 8, 1)
    torch.nn.init.normal_(head.net.out.weight)
    x = torch.randn(2, 700, 4, generator=torch.Generator().manual_seed(2))
    expected = head.mean(head(x))
    assert torch.allclose(
        head.value(x), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
    )


def test_two_hot_takes_probabilities_that_are_known():
    head = TwoHot(4, 8, 1)
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(3)).requires_grad_()
    target = torch.tensor([-3.0, -0.1, 0.0, 7.0, 100.0])
    (expected,) = torch.autograd.grad(head.loss(logits, target).sum(), logits)
    loss = head.loss(logits, target, probs=logits.detach().softmax(-1))
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], expected)


def test_two_hot_loss_is_the_cross_entropy_of_an_interpolated_target():
    head = TwoHot(4, 8, 1, bins=41)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 41, generator=generator)
    target = torch.tensor([-1e9, -7.3, 0.0, 0.02, 12.0, 1e9])
    encoded = torch.zeros(6, 41)
    edges, order = head.bins.sort()
    for row, value in enumerate(target.clamp(edges[0], edges[-1]).tolist()):
        for low in range(40):
            a, b = edges[low].item(), edges[low + 1].item()
            if a <= value <= b:
                encoded[row] = 0
                encoded[row, order[low]] = (b - value) / (b - a)
                encoded[row, order[low + 1]] = (value - a) / (b - a)
    assert torch.allclose(encoded.sum(-1), torch.ones(6))
    expected = -(encoded * F.log_softmax(logits, -1)).sum(-1)
    assert torch.allclose(head.loss(logits, target), expected, atol=1e-4)


def test_draws_follow_the_probabilities_and_are_one_hot():
    probs = unimix(torch.tensor([[2.0, 0.0, -1.0]]), 0.01).expand(40_000, 3)
    drawn = sample(probs, race(probs.shape, torch.Generator().manual_seed(0)))
    assert torch.equal(drawn.sum(-1), torch.ones(40_000))
    assert torch.allclose(drawn.mean(0), probs[0], atol=0.01)


def test_a_draw_for_many_steps_equals_draws_step_by_step():
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    whole = race((5, 3, 4, 2), a)
    steps = torch.cat([race((1, 3, 4, 2), b) for _ in range(5)])
    assert torch.equal(whole, steps)


def test_unimix_never_reaches_zero_and_kl_is_torch_s():
    p = unimix(torch.tensor([[[60.0, 0.0, -60.0]]]), 0.01)
    assert p.min() > 0.003
    q = unimix(torch.tensor([[[0.0, 1.0, 2.0]]]), 0.01)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    assert torch.allclose(kl(p, q), expected.sum(-1), atol=1e-5)


def test_cross_entropy_by_hand_is_the_readable_one():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, 41, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 4, 4, 5]).expand(3, 4, 4)  # a class may come twice
    share = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    push = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ours = cross_entropy(logits, index, share)
    theirs = -(logits.log_softmax(-1).gather(-1, index) * share).sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    a, b = (torch.autograd.grad(y, logits, push, retain_graph=True)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    mapped = torch.func.vmap(cross_entropy)(logits, index, share)
    torch.testing.assert_close(mapped, theirs)


def test_cross_entropy_of_the_impossible_still_has_its_gradient():
    logits = torch.tensor([0.0, 200.0], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]), torch.tensor([1.0]))
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.tensor([-1.0, 1.0]))
    assert 80 < loss.item() <= 200


@pytest.mark.parametrize("classes", [2, 8, 15, 16, 255])
def test_softmax_is_torch_s(classes: int):
    logits = 30 * torch.randn(5, 3, classes, dtype=torch.float64, requires_grad=True)  # pyright: ignore
    push = torch.randn(5, 3, classes, dtype=torch.float64)
    ours, theirs = softmax(logits), logits.softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    a, b = (torch.autograd.grad(y, logits, push)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(softmax_back(push, ours.detach()), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mix", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1, 200])
def test_chosen_is_a_sample_of_the_mixture(mix: float, scale: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(64, 8, 4, generator=generator, dtype=torch.float64)
    noise = race(logits.shape, generator).double()
    assert torch.equal(chosen(logits, noise, mix), sample(unimix(logits, mix), noise))
    low = chosen(logits.bfloat16(), noise, mix)
    assert torch.equal(low.double(), sample(unimix(logits.bfloat16(), mix), noise).double())


@pytest.mark.parametrize("free", [0.0, 0.3, 100.0])
def test_a_balanced_kl_is_both_of_its_directions(free: float):
    g = torch.Generator().manual_seed(0)
    raw = [torch.randn(5, 2, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    found = []
    for by_hand in (True, False):
        p, q = (unimix(x.clone().requires_grad_(), 0.01) for x in raw)
        if by_hand:
            dyn, rep = balanced_kl(p, q, free)
        else:
            dyn, rep = kl(p.detach(), q).clamp(min=free), kl(p, q.detach()).clamp(min=free)
        out = torch.arange(5.0) @ dyn.float() + torch.arange(1.0, 6.0) @ rep.float()
        found.append([dyn, rep, *torch.autograd.grad(out, [p, q], allow_unused=True)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_every_target_needs_a_weight():
    head = TwoHot(4, 8, 1)
    logits, target = head(torch.randn(5, 4)), torch.zeros(5)
    with pytest.raises(ValueError, match="2 targets need as many weights, not 1"):
        head.loss(logits, target, target)
