"""Shortcut forcing: its algebra, levels, what is read and what is not, sampling, learning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nested import fast
from tests.zoo import MEMORIES
from worldmodel.shortcut import WEIGHTS, Clip, Lengths, Levels, ShortcutDynamics, normal
from worldmodel.transformer import Transformer, Trunk


def make(k_max: int = 8, **options: Any) -> ShortcutDynamics:
    """Two spatial tokens of three channels, two action tokens, one agent token with two tasks."""
    torch.manual_seed(0)
    options = {"tasks": 2, "registers": 1, "action_tokens": 2, "spatial": 2} | options
    model = ShortcutDynamics(3, (3, 2), Trunk(16, 3, 2, 1, 2, context=4), k_max=k_max, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clips(batch: int = 4, length: int = 6, dtype: torch.dtype = torch.float32) -> Clip:
    """Random latents and actions; row 1 starts again, row 2 has no labels, row 3 task 1."""
    g = torch.Generator().manual_seed(1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = first[1, 3] = True
    labelled = torch.ones_like(first)
    labelled[2] = False
    task = torch.zeros(batch, length, dtype=torch.int64)
    task[3] = 1
    latents = torch.rand(batch, length, 3, 2, generator=g, dtype=dtype) * 2 - 1
    return Clip(
        latents, torch.randn(batch, length, 3, generator=g, dtype=dtype), first, labelled, task
    )


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(model: ShortcutDynamics, clip: Clip) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The clean frame f(z, signal, step) as the network predicts it."""
    actions = model._actions(clip)

    def f(z: Tensor, signal: Tensor, step: Tensor) -> Tensor:
        x = model.transformer(model._tokens(z, Levels(signal, step), actions), clip.first)
        return model.to_latent(x[:, :, : model.spatial])

    return f


def test_levels_lie_on_the_grid_of_their_step_and_only_chosen_rows_draw_a_step():
    model = make(k_max=8)
    rows = torch.arange(500)
    signal, step = model.draw(rows, 1000, 16, seeded())
    size = 8 // 2**step
    assert (signal % size == 0).all() and (signal >= 0).all() and (signal <= 8 - size).all()
    assert (step[500:] == 3).all()
    shares = torch.stack([(step[:500] == i).float().mean() for i in range(4)])
    assert torch.allclose(shares, torch.tensor(0.25), atol=0.02)
    fine = torch.bincount(signal[500:].flatten(), minlength=8)
    assert torch.allclose(fine / fine.sum(), torch.tensor(1 / 8), atol=0.02)


@pytest.mark.parametrize("weight", ["ramp", "flat"])
@pytest.mark.parametrize("space", ["x", "v"])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_loss_is_that_of_the_paper_frame_by_frame(prediction: Any, space: Any, weight: Any):
    options = {"prediction": prediction, "loss": space, "weight": weight}
    model = make(bootstrap=0.5, apart=0.0, **options).double()
    clip = clips(dtype=torch.float64)
    losses, _ = model.losses(clip, seeded())
    g = seeded()  # the same draws, in the same order
    torch.rand(4, 1, generator=g)
    rows = torch.randperm(4, generator=g)[:2]
    signal, step = model.draw(rows, 4, 6, g)
    z1 = model.pack(clip.latents)
    z0 = torch.randn(z1.shape, generator=g, dtype=torch.float64)
    tau, d = signal.double()[..., None, None] / 8, 0.5 ** step.double()[..., None, None]
    z = (1 - tau) * z0 + tau * z1
    out = network(model, clip)
    f = (
        out
        if prediction == "x"
        else lambda z, s, d: z + (1 - s[..., None, None] / 8) * out(z, s, d)
    )
    half = (step + 1).clamp(max=3)
    jump = torch.where(step == 3, 0, 8 // 2 ** (step + 1))
    b1 = (f(z, signal, half) - z) / (1 - tau)
    z2 = torch.where((step == 3)[..., None, None], z, z + b1 * d / 2)
    tau2 = (signal + jump)[..., None, None] / 8
    b2 = (f(z2, signal + jump, half) - z2) / (1 - tau2)
    v = (f(z, signal, step) - z) / (1 - tau)
    finest = (step == 3)[..., None, None]
    flow = (f(z, signal, step) - z1).square()
    shortcut = (1 - tau) ** 2 * (v - (b1 + b2) / 2).square()
    expected = torch.where(finest, flow, shortcut).mean((2, 3))
    tau = tau[..., 0, 0]
    expected = expected / (1 - tau) ** 2 if space == "v" else expected
    expected = expected * (0.9 * tau + 0.1) if weight == "ramp" else expected
    assert (step < 3).any() and (step == 3).any()
    expected = expected / expected.square().mean().sqrt()
    assert torch.allclose(losses["dynamics"], expected, rtol=1e-10, atol=1e-12)


def test_the_ramp_gives_weight_to_signal():
    tau = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(WEIGHTS["ramp"](tau), torch.tensor([0.1, 0.55, 1.0]))
    assert torch.equal(WEIGHTS["flat"](tau), torch.ones(3))


def test_targets_have_no_gradient_and_without_shortcuts_are_the_data():
    model, clip = make(), clips()
    data, rows = model.pack(clip.latents), torch.arange(4)
    levels = model.draw(rows, 4, 6, seeded())
    actions = model._actions(clip)
    assert actions.requires_grad
    z = torch.randn_like(data, requires_grad=True)
    target = model.targets(data, z, levels, actions, clip.first, rows)
    assert not target.requires_grad
    finest = levels.step == 3
    assert torch.equal(target[finest], data[finest])
    assert not torch.isclose(target[~finest], data[~finest]).any()
    assert torch.equal(model.targets(data, z, levels, actions, clip.first, rows[:0]), data)


def test_half_steps_run_only_for_the_rows_that_need_them():
    seen = []
    model, clip = make(bootstrap=0.25), clips()
    model.transformer.register_forward_hook(
        lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    model.losses(clip, seeded())
    assert seen == [(4, True), (1, False), (1, False)]


def test_losses_reach_every_parameter_but_those_of_the_agent_tokens():
    model = make(apart=0.0)
    losses, feature = model.losses(clips(), seeded())
    assert losses["dynamics"].shape == (4, 6) and feature.shape == (4, 6, model.feature)
    losses["dynamics"].mean().backward(retain_graph=True)
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"agent", "task.weight"}
    feature.square().sum().backward()
    assert model.agent.grad is not None and model.agent.grad.any()


def test_nothing_reads_the_agent_tokens_and_they_read_everything():
    model, clip = make(), clips()
    other = clip._replace(task=1 - clip.task)
    data = model.pack(clip.latents)
    levels = model.draw(torch.arange(4), 4, 6, seeded())
    outs = []
    for c in (clip, other, clip._replace(latents=clip.latents + 1)):
        tokens = model._all(model.pack(c.latents), levels, model._actions(c), c.task)
        outs.append(model._look(model.transformer(tokens, c.first)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert not torch.isclose(outs[0][1], outs[1][1]).all(-1).any()
    assert not torch.isclose(outs[0][1], outs[2][1]).all(-1).any()
    alone = model.transformer(model._tokens(data, levels, model._actions(clip)), clip.first)
    assert torch.allclose(model._look(alone)[0], outs[0][0], atol=1e-6)


def test_unknown_actions_are_one_embedding_and_not_an_action_of_zeros():
    model, clip = make(), clips()
    tokens = model._actions(clip)
    nothing = model.no_action.expand(6, -1, -1)
    assert torch.equal(tokens[2], nothing)  # no labels
    assert torch.equal(tokens[0, 0], nothing[0])  # the action before a first frame
    zeros = model._actions(clip._replace(action=torch.zeros_like(clip.action)))
    assert not torch.isclose(zeros[0, 1:], nothing[1:]).all()
    different = clip._replace(action=torch.where(clip.labelled[..., None], clip.action, torch.nan))
    assert torch.equal(model._actions(different), tokens)


def test_features_come_frame_by_frame_as_in_one_and_never_from_the_future():
    model, clip = make(context_noise=0.0), clips()
    whole, last = model.observe(clip, model.initial(4), seeded())
    context, parts = model.initial(4), []
    for t in range(6):
        row = Clip(*(x[:, t : t + 1] for x in clip))
        feature, context = model.observe(row, context, seeded())
        parts.append(feature)
    # at a level of one there is no noise to draw
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    for a, b in zip(fast.leaves(context), fast.leaves(last), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    changed = clip._replace(latents=clip.latents.clone(), action=clip.action.clone())
    changed.latents[0, 4:] += 1
    changed.action[0, 4:] += 1
    other, _ = model.observe(changed, model.initial(4), seeded())
    assert torch.equal(other[0, :4], whole[0, :4]) and torch.equal(other[1:], whole[1:])
    assert not torch.isclose(other[0, 4:], whole[0, 4:]).all()


@pytest.mark.parametrize(
    "k_max, noise, level, clear",
    [
        (8, 0.1, 7, 7 / 8),
        (64, 0.1, 58, 58 / 64),
        (8, 0.4, 5, 5 / 8),
        (4, 0.1, 3, 0.9),  # the nearest is 4, clean frames, a level that is never trained
        (2, 0.1, 1, 0.9),
        (2, 0.5, 1, 0.5),
        (8, 0.0, 7, 1.0),
    ],
)
def test_frames_of_a_context_are_noised_and_told_the_nearest_level_of_training(
    k_max: int, noise: float, level: int, clear: float
):
    model, clip = make(k_max=k_max, context_noise=noise), clips()
    trained = model.draw(torch.arange(64), 64, 64, seeded()).signal.unique().tolist()
    assert model.kept == level and trained == list(range(k_max))
    feature, _ = model.observe(clip, model.initial(4), seeded())
    data = model.pack(clip.latents)
    z = data * clear + normal(data, seeded()) * (1 - clear)
    told = Levels(torch.full((4, 6), level), torch.full((4, 6), model.finest))
    tokens = model._all(z, told, model._actions(clip), clip.task)
    assert torch.allclose(model._look(model.transformer(tokens, clip.first))[1], feature, atol=1e-5)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_frame_is_sampled_by_euler_steps_after_its_context(prediction: Any, steps: int):
    model, clip = (
        make(prediction=prediction, context_noise=0.0).double(),
        clips(dtype=torch.float64),
    )
    old, new = (Clip(*(x[:, a:b] for x in clip)) for a, b in ((0, 5), (5, 6)))
    _, context = model.observe(old, model.initial(4), seeded())
    frame = model.generate(new, context, steps, seeded())
    z = torch.randn(4, 1, 2, 3, generator=seeded(), dtype=torch.float64)
    whole = network(model, clip)
    d = 1 / steps
    for i in range(steps):  # the same, on the whole sequence without a context
        signal = torch.full((4, 6), model.kept)
        step = torch.full((4, 6), 3)
        signal[:, 5], step[:, 5] = 8 * i // steps, steps.bit_length() - 1
        out = whole(torch.cat([model.pack(old.latents), z], 1), signal, step)[:, 5:]
        v = (out - z) / (1 - i * d) if prediction == "x" else out
        z = z + d * v
    assert torch.allclose(frame.view_as(z), z, atol=1e-10)


def test_imagination_takes_the_policy_s_actions_and_leaves_its_start_alone():
    model, clip = make(), clips()
    features, context = model.observe(clip, model.initial(4), seeded())
    before = fast.tree_map(torch.clone, context)
    start, task = features[:, -1], clip.task[:, 0]

    def policy(feature: Tensor) -> Tensor:
        return feature[:, :3]

    rollout, after = model.imagine(context, start, policy, 5, task, 4, seeded())
    assert rollout.latents.shape == (4, 5, 3, 2)
    assert torch.equal(rollout.feature[:, 0], start)
    assert torch.equal(rollout.action, rollout.feature[..., :3])
    assert not rollout.latents.requires_grad
    assert torch.equal(after.seen, torch.full((4,), 11))
    assert all(map(torch.equal, fast.leaves(context), fast.leaves(before)))
    bold, _ = model.imagine(context, start, lambda f: f[:, :3] + 2, 5, task, 4, seeded())
    assert not torch.isclose(bold.latents[:, 0], rollout.latents[:, 0]).all()


@contextmanager
def levels_told(model: ShortcutDynamics) -> Iterator[list[Levels]]:
    """The levels of noise that the network is told while it works."""
    told: list[Levels] = []
    tokens = model._tokens

    def spy(z: Tensor, levels: Levels, actions: Tensor) -> Tensor:
        told.append(levels)
        return tokens(z, levels, actions)

    model._tokens = spy
    yield told
    model._tokens = tokens


def test_settled_rows_are_seen_whole_and_as_noisy_as_a_context():
    model, clip = make(apart=1.0), clips()
    settled = torch.tensor([True, False, True, False])
    with levels_told(model) as told:
        model.losses(clip, seeded(), settled=settled)
    assert (told[0].signal[settled] == model.kept).all()
    assert (told[0].step[settled] == model.finest).all()
    assert (told[0].signal[~settled] != model.kept).any()
    none = torch.zeros_like(settled)
    plain, same = (model.losses(clip, seeded(), settled=rows)[1] for rows in (None, none))
    assert torch.equal(plain, same)
    exact = make(apart=1.0, context_noise=0.0)  # whole: what comes first is read by what follows
    before = clip._replace(latents=torch.cat([clip.latents[:, 1:2], clip.latents[:, 1:]], 1))
    one, two = (exact.losses(c, seeded(), settled=settled)[1][:, 2] for c in (clip, before))
    changed = (one != two).any(1)
    assert torch.equal(changed, settled)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_frames_is_as_clear_as_a_context(share: float):
    model = make(settled=share, k_max=64, bootstrap=0.5)
    with levels_told(model) as told:
        model.losses(clips(64, 32), seeded())
    clear = (told[0].signal == model.kept) & (told[0].step == model.finest)
    assert clear.float().mean().item() == pytest.approx(share, abs=0.04)


def test_a_share_of_rows_is_seen_as_separate_images():
    model, clip = make(apart=1.0, bootstrap=0.0), clips()
    _, feature = model.losses(clip, seeded())
    later = clip._replace(latents=clip.latents.clone())
    later.latents[:, 2] += 1
    _, other = model.losses(later, seeded())
    changed = (feature - other).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]


def test_it_learns_a_few_clips_by_heart_at_every_step_size():
    model, clip = make(apart=0.0), clips()
    clip = clip._replace(labelled=torch.ones_like(clip.first), first=torch.zeros_like(clip.first))
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), seeded()
    for _ in range(130):
        optimizer.zero_grad()
        model.losses(clip, generator)[0]["dynamics"].mean().backward()
        optimizer.step()
    data = model.pack(clip.latents)
    noise, none = normal(data, seeded(9)), torch.zeros(4, 6, dtype=torch.int64)
    for step in range(4):  # from noise alone, where only actions tell the frames apart
        with torch.no_grad():
            error = network(model, clip)(noise, none, none + step) - data
        assert error.square().mean() < data.var() / 2


def test_no_row_of_shortcuts_is_no_pass_at_all():
    """A memory has no state for no rows; and there is nothing to learn from them."""
    model, clip = make(bootstrap=0.0), clips()
    trunk = Trunk(16, 3, 2, 1, 2, context=8, memory=MEMORIES["delta"])
    model.transformer = Transformer(trunk, model.core + model.agents, model.transformer.among)
    losses, _ = model.losses(clip, seeded())
    assert (losses["dynamics"] > 0).all()


def test_long_batches_come_at_regular_updates():
    lengths = Lengths(short=4, long=12, every=3)
    assert [lengths.at(update) for update in range(1, 7)] == [4, 4, 12, 4, 4, 12]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k_max": 6}, "k_max=6"),
        ({"k_max": 1}, "k_max=1 must.*from 2 on"),
        ({"spatial": 4}, r"latents=\(3, 2\).*spatial=4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("steps", [0, 3, 16])
def test_sampling_steps_lie_on_the_grid(steps: int):
    model, clip = make(), clips()
    with pytest.raises(ValueError, match=f"steps={steps} must be a power of two up to k_max=8"):
        model.generate(Clip(*(x[:, :1] for x in clip)), model.initial(4), steps)


def test_with_memories_frames_from_the_cache_are_those_of_the_whole_sequence():
    model, clip = make(), clips()
    gated, delta = MEMORIES["gated delta"], MEMORIES["delta"]
    trunk = Trunk(16, 3, 2, 1, 2, context=8, memory=gated, feed=delta)
    model.transformer = Transformer(trunk, model.core + model.agents, model.transformer.among)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    g, context, found = seeded(), model.initial(4), []
    for t in range(6):
        row = Clip(*(x[:, t : t + 1] for x in clip))
        feature, context = model.observe(row, context, g)
        found.append(feature)
    g, noise = seeded(), []
    for _ in range(6):
        noise.append(normal(clip.latents[:, :1].reshape(4, 1, 2, 3), g))
    signal = torch.full_like(clip.task, model.kept)
    levels = Levels(signal, torch.full_like(signal, model.finest))
    z = torch.lerp(torch.cat(noise, 1), model.pack(clip.latents), model.clear)
    tokens = model._all(z, levels, model._actions(clip), clip.task)
    whole = model._look(model.transformer(tokens, clip.first))[1]
    assert (torch.cat(found, 1) - whole).abs().max() <= 1e-4
