"""An MLP in one node is its layers one by one; a recording is what the node would work out."""

import pytest
import torch
from torch.nn import functional as F

from nested import fast
from worldmodel import mlp
from worldmodel.mlp import MLP, Recording

WIDTHS = pytest.mark.parametrize("n_out, fill", [(1, None), (3, None), (17, None), (17, -2.0)])
GROUPS = pytest.mark.parametrize("groups", [0, 1, 3])


def make(groups: int, n_out: int, layers: int = 2, fill: float | None = None):
    """An MLP of 5 inputs and 6 units, and weights of all its groups, off their start."""
    torch.manual_seed(0)
    net = MLP(5, n_out, 6, layers, fill=fill).double()
    lead = (groups,) if groups else ()
    weights = {
        name: torch.randn(*lead, *p.shape, dtype=torch.float64, requires_grad=True)
        for name, p in net.named_parameters()
    }
    return net, weights


def grads_of(net: MLP, weights: dict[str, torch.Tensor], x: torch.Tensor, *recording: Recording):
    """The output, and the gradients of the weights and of x where it wants one."""
    out = fast.bind(net, weights, MLP.forward)(x, *recording)
    seen = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = [*weights.values(), *([x] if x.requires_grad else [])]
    return out, torch.autograd.grad(out, wanted, seen)


@WIDTHS
@GROUPS
@pytest.mark.parametrize("wanted", [True, False], ids=["to the inputs", "weights alone"])
@pytest.mark.parametrize("layers", [0, 2])
def test_one_node_has_the_values_and_gradients_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, n_out, fill, groups, wanted, layers
):
    net, weights = make(groups, n_out, layers, fill)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=wanted)
    expected, slow = grads_of(net, weights, x)
    monkeypatch.setattr(mlp, "MANY", 0)
    found, quick = grads_of(net, weights, x)
    assert "Through" in str(found.grad_fn.next_functions) + str(found.grad_fn)
    torch.testing.assert_close(found, expected)
    assert found.shape[-1] == (32 if fill else n_out)
    for a, b in zip(quick, slow, strict=True):
        torch.testing.assert_close(a, b)


@GROUPS
def test_a_recording_stands_in_for_the_way_there(monkeypatch: pytest.MonkeyPatch, groups: int):
    monkeypatch.setattr(mlp, "MANY", 0)
    net, weights = make(groups, 3)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    expected, slow = grads_of(net, weights, x)
    recording = fast.bind(net, weights, MLP.recording)(x, 4)
    assert recording is not None
    with torch.no_grad():
        steps = [fast.bind(net, weights, MLP.forward)(row, recording) for row in x.unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), expected)
    found, quick = grads_of(net, weights, x, recording)
    torch.testing.assert_close(found, expected)
    for a, b in zip(quick, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_recorded_where_no_node_could_read_it():
    net, x = MLP(5, 3, 6, 1), torch.randn(2, 5)
    assert net.recording(x, 3) is not None
    assert net.recording(x, mlp.RECORDED) is None
    with torch.no_grad():
        assert net.recording(x, 3) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert net.recording(x, 3) is None
    vmapped = torch.func.vmap(lambda row: net(row))(torch.randn(4, 2000, 5))
    assert vmapped.shape == (4, 2000, 3)


def test_the_columns_that_fill_a_row_cannot_be_chosen():
    net = MLP(5, 255, 6, 1, fill=-torch.inf)
    out = net(torch.randn(2, 5))
    assert out.shape == (2, 256) and out[:, 255].eq(-torch.inf).all()
    assert F.softmax(out, -1)[:, 255].eq(0).all()
