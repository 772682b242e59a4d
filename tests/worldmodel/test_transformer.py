"""The transformer: causal, one law for a sequence and a step, resets, rows by themselves."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nested import fast
from tests.zoo import MEMORIES
from worldmodel.transformer import Context, Transformer, Trunk, stack

CAPS = pytest.mark.parametrize("cap", [50.0, 0.0], ids=["capped", "fused"])


def make(cap: float = 50.0, context: int = 4, mask: Tensor | None = None) -> Transformer:
    """Two time layers among five; grouped queries."""
    torch.manual_seed(0)
    return Transformer(Trunk(16, 5, 4, 2, 2, context, cap), 3, mask)


# memories beside attention, instead of it, and in place of or behind feed-forward networks
KINDS: dict[str, Any] = {
    "beside": {"memory": MEMORIES["gated delta"], "place": "beside"},
    "instead": {"memory": MEMORIES["delta"], "place": "instead"},
    "chunks": {"memory": MEMORIES["neural, chunks"], "place": "instead"},
    "feed": {"feed": MEMORIES["continuum"]},
    "all": {"memory": MEMORIES["hope"], "feed": MEMORIES["delta"], "chain": 2},
}


def made_of(kind: str, context: int = 4, drop: int = 0) -> Transformer:
    """As `make`, with the parts of `KINDS`, off the special values that they begin with."""
    torch.manual_seed(0)
    model = Transformer(Trunk(16, 3, 4, 2, 2, context, **KINDS[kind]), 3, drop=drop)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def frames(batch: int = 3, length: int = 11) -> tuple[Tensor, Tensor]:
    """Random tokens (B, T, 3, 16), and episode starts in the middle of rows 1 and 2."""
    g = torch.Generator().manual_seed(1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[1, 4] = first[2, 0] = first[2, 7] = True
    return torch.randn(batch, length, 3, 16, generator=g), first


def in_parts(
    model: Transformer, x: Tensor, first: Tensor, cuts: list[int]
) -> tuple[Tensor, Context]:
    """Outputs of the pieces between the cuts, one after another."""
    context, parts = model.initial(len(x)), []
    for a, b in pairwise(cuts):
        y, context = model.extend(x[:, a:b], context, first[:, a:b])
        parts.append(y)
    return torch.cat(parts, 1), context


@CAPS
def test_a_future_frame_never_changes_a_past_output(cap: float):
    model, (x, first) = make(cap), frames()
    later = x.clone()
    later[:, 6:] = 100 * torch.randn(3, 5, 3, 16)
    for starts in (None, first):
        a, b = model(x, starts), model(later, starts)
        assert torch.equal(a[:, :6], b[:, :6])
        assert not torch.equal(a[:, 6], b[:, 6])


@CAPS
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("cuts", [list(range(12)), [0, 11], [0, 3, 4, 10, 11]])
def test_any_split_equals_the_whole_sequence(
    cap: float, dtype: torch.dtype, within: float, cuts: list[int]
):
    model, (x, first) = make(cap).to(dtype), frames()
    whole = model(x.to(dtype), first)
    parts, _ = in_parts(model, x.to(dtype), first, cuts)
    assert (whole - parts).abs().max() <= within


def test_peeking_gives_what_extending_does_and_writes_nothing():
    model, (x, first) = make(), frames()
    _, context = in_parts(model, x[:, :6], first[:, :6], [0, 6])
    before = fast.tree_map(torch.clone, context)
    seen = model.peek(x[:, 6:8], context, first[:, 6:8])
    assert all(map(torch.equal, fast.leaves(context), fast.leaves(before)))
    assert torch.equal(seen, model.extend(x[:, 6:8], context, first[:, 6:8])[0])


@CAPS
def test_a_frame_sees_as_many_frames_as_its_time_layers_reach(cap: float):
    model, (x, _) = make(cap, context=3), frames(length=11)
    changed = x.clone()
    changed[:, 0] += 1
    difference = (model(x) - model(changed)).abs().amax((0, 2, 3))
    assert (difference[:5] > 0).all()  # two time layers, each two frames back
    assert (difference[5:] == 0).all()


def test_nothing_before_a_first_frame_matters():
    model, (x, _) = make(), frames()
    first = torch.zeros(3, 11, dtype=torch.bool)
    first[:, 5] = True
    whole, _ = in_parts(model, x, first, [0, 3, 11])
    alone = model(x[:, 5:])
    assert torch.allclose(whole[:, 5:], alone, atol=1e-5)
    assert not torch.allclose(model(x)[:, 5:], alone, atol=1e-3)


def test_one_row_never_touches_another():
    model, (x, first) = make(), frames()
    other = x.clone()
    other[1] = torch.nan
    for cuts in ([0, 11], [0, 1, 5, 11]):
        a, b = in_parts(model, x, first, cuts), in_parts(model, other, first, cuts)
        for one, two in zip(fast.leaves(a), fast.leaves(b), strict=True):
            assert torch.equal(one[[0, 2]], two[[0, 2]])


def test_rows_of_a_context_may_be_of_different_ages():
    model, (x, first) = make(), frames()
    _, old = in_parts(model, x[:1], first[:1], [0, 6])
    _, young = in_parts(model, x[1:2], first[:1], [0, 2])
    both = fast.tree_map(lambda a, b: torch.cat([a, b]), old, young)
    y, _ = model.extend(torch.cat([x[:1, 6:9], x[1:2, 2:5]]), both)
    assert torch.allclose(y[0], model(x[:1, :9])[0, 6:], atol=1e-5)
    assert torch.allclose(y[1], model(x[1:2, :5])[0, 2:], atol=1e-5)


def test_a_mask_says_which_tokens_of_a_frame_are_read():
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[:2, 2] = False  # nobody reads the last token
    model, (x, first) = make(mask=mask), frames()
    changed = x.clone()
    changed[:, :, 2] += 1
    a, b = model(x, first), model(changed, first)
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert torch.allclose(model(x[:, :, :2], first), a[:, :, :2], atol=1e-6)
    _, context = model.extend(x, model.initial(3), first)
    peeked = model.peek(x[:, :1, :2], context)
    assert torch.allclose(peeked, model.peek(x[:, :1], context)[:, :, :2], atol=1e-6)
    with pytest.raises(ValueError, match="keeps 3 tokens a frame, not 2"):
        model.extend(x[:, :, :2], context)


def test_the_cap_bounds_logits_and_the_written_out_attention_equals_torch_s():
    x, first = frames()
    loose = make(cap=1e6).double()
    plain = make(cap=0.0).double()
    assert torch.allclose(loose(x.double(), first), plain(x.double(), first), atol=1e-9)
    assert not torch.allclose(make(cap=0.5)(x), make(cap=0.0)(x), atol=1e-3)


def test_tokens_without_an_output_are_read_all_the_same():
    torch.manual_seed(0)
    model, (x, first) = Transformer(Trunk(16, 5, 4, 2, 2, 4), 3, drop=2), frames()
    whole = make()(x, first)
    assert torch.allclose(model(x, first), whole[:, :, :1], atol=1e-6)
    assert torch.allclose(in_parts(model, x, first, [0, 3, 11])[0], whole[:, :, :1], atol=1e-5)


def test_every_parameter_learns():
    model, (x, first) = make(), frames()
    (model(x, first) * torch.randn(3, 11, 3, 16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("sizes", [(15, 4, 2), (16, 4, 3)])
def test_sizes_that_do_not_fit_are_named(sizes: tuple[int, int, int]):
    width, heads, groups = sizes
    with pytest.raises(ValueError, match=f"width={width} / heads={heads} / groups={groups}|even"):
        Transformer(Trunk(width, 2, heads, groups), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [list(range(12)), [0, 3, 4, 10, 11]], ids=["steps", "parts"])
def test_with_memories_any_split_equals_the_whole_sequence(kind: str, cuts: list[int]):
    model, (x, first) = made_of(kind), frames()
    whole = model(x, first)
    parts, context = in_parts(model, x, first, cuts)
    assert (whole - parts).abs().max() <= 1e-5
    before = fast.tree_map(torch.clone, context)
    ahead = model.peek(x[:, :1], context)
    assert all(map(torch.equal, fast.leaves(context), fast.leaves(before)))
    assert torch.equal(ahead, model.extend(x[:, :1], context)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_memories_the_future_and_other_rows_are_not_read(kind: str):
    model, (x, first) = made_of(kind), frames()
    other = x.clone()
    other[:, 6:] += 1
    other[1] = torch.nan
    a, b = in_parts(model, x, first, [0, 5, 11])[0], in_parts(model, other, first, [0, 5, 11])[0]
    assert torch.equal(a[[0, 2], :6], b[[0, 2], :6])
    assert not torch.equal(a[0, 6], b[0, 6])


def test_a_memory_reaches_further_than_attention_but_not_past_a_first_frame():
    model, (x, _) = made_of("beside", context=2), frames(length=11)
    changed = x.clone()
    changed[:, 0] += 1
    plain = make(context=2)
    assert torch.equal(plain(x)[:, 5:], plain(changed)[:, 5:])
    assert not torch.equal(model(x)[:, 10], model(changed)[:, 10])
    first = torch.zeros(3, 11, dtype=torch.bool)
    first[:, 5] = True
    assert torch.equal(model(x, first)[:, 5:], model(changed, first)[:, 5:])
    assert torch.allclose(model(x, first)[:, 5:], model(x[:, 5:]), atol=1e-5)


@pytest.mark.parametrize("kind", ["beside", "feed"])
def test_tokens_without_an_output_have_no_feed_forward_memory(kind: str):
    model, whole, (x, first) = made_of(kind, drop=2), made_of(kind), frames()
    assert torch.allclose(model(x, first), whole(x, first)[:, :, :1], atol=1e-6)
    assert torch.allclose(in_parts(model, x, first, [0, 3, 11])[0], model(x, first), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_memories_every_parameter_learns(kind: str):
    model, (x, first) = made_of(kind), frames()
    (model(x, first) * torch.randn(3, 11, 3, 16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_new_parts_on_trained_weights_change_nothing_bit_for_bit():
    trained, (x, first) = make(), frames()
    parts = Trunk(16, 5, 4, 2, 2, 4, memory=MEMORIES["gated delta"], chain=1)
    model = Transformer(parts, 3)
    new = stack(model, trained.state_dict())
    assert torch.equal(model(x, first), trained(x, first))
    a, b = in_parts(model, x, first, [0, 4, 11])[0], in_parts(trained, x, first, [0, 4, 11])[0]
    assert torch.equal(a, b)
    names = {name for name, _ in model.named_parameters()}
    assert set(new) == names - {name for name, _ in trained.named_parameters()}
    assert {name.split(".")[2] for name in new} == {"beside", "chain"}
    (model(x, first) * torch.randn(3, 11, 3, 16)).sum().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not [n for n in new if n.endswith(("beside.scale", "chain.0.out.weight")) and n in still]


def test_stacking_what_would_be_heard_is_refused():
    trained = make().state_dict()
    deeper = Transformer(Trunk(16, 6, 4, 2, 2, 4), 3)
    with pytest.raises(ValueError, match=r"not silent: \['layers\.5"):
        stack(deeper, trained)
    with pytest.raises(ValueError, match=r"no room for \['layers\.0\.mlp"):
        stack(Transformer(Trunk(16, 5, 4, 2, 2, 4, feed=MEMORIES["delta"]), 3), trained)
