"""The offline agent: what each head is taught, which rows count, imagination, acting."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from agents.actions import Actions, Choice, Keys
from agents.offline import Experience, OfflineDreamer, counted, following, twohot
from agents.pmpo import pmpo
from agents.returns import lambda_return
from nested import fast
from worldmodel import Batch, Clip, ShortcutDynamics, Tokenizer, Trunk

SIZE = (8, 8, 3)


def make(**options: Any) -> OfflineDreamer:
    """Actions are one of three, and two keys."""
    torch.manual_seed(0)
    trunk = Trunk(16, 3, 2, 1, 2, context=8)
    tokenizer = Tokenizer(SIZE, 4, 3, 2, trunk, trunk)
    dynamics = ShortcutDynamics(5, (3, 2), trunk, 2, registers=1, tasks=2)
    options = {"units": 16, "ahead": 3, "horizon": 4} | options
    agent = OfflineDreamer(tokenizer, dynamics, Actions([Choice(3), Keys(2)]), **options)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def experience(batch: int = 4, length: int = 6) -> Experience:
    """Row 1 starts again in the middle; rows 0 and 1 are for imitation, the others for dynamics."""
    g = torch.Generator().manual_seed(1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = first[1, 3] = True
    choice = torch.nn.functional.one_hot(torch.randint(3, (batch, length), generator=g), 3).float()
    keys = torch.randint(2, (batch, length, 2), generator=g).float()
    latents = torch.rand(batch, length, 3, 2, generator=g) * 2 - 1
    task = torch.arange(batch)[:, None].expand(batch, length) % 2
    clip = Clip(latents, torch.cat([choice, keys], -1), first, torch.ones_like(first), task)
    reward = torch.randn(batch, length, generator=g)
    terminal = torch.zeros_like(first)
    terminal[1, 2] = True
    rows = torch.tensor([True, True, False, False])
    return Experience(clip, reward, terminal, rows, ~rows, rows)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [0, 1])
def test_following_rows_are_those_of_the_same_episode(shift: int):
    first = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    x = torch.arange(10).view(2, 5)
    rows, same = following(x, first, 3, shift)
    for b in range(2):
        for t in range(5):
            for n in range(3):
                k = t + n + shift
                there = k < 5 and not first[b, t + 1 : k + 1].any()
                assert same[b, t, n] == there
                assert not there or rows[b, t, n] == x[b, k]


def test_the_mean_of_what_counts():
    loss, weight = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert counted(loss, weight).mean() == 2.0
    assert torch.equal(counted(loss, 0 * weight), torch.zeros(2, 2))


def test_imitation_is_the_likelihood_of_the_actions_to_come():
    agent, batch = make(), experience()
    feature = torch.randn(4, 6, agent.dynamics.feature)
    clip = batch.clip._replace(labelled=batch.clip.labelled.clone())
    clip.labelled[0, 2] = False
    loss = agent._imitation(clip, feature)
    logits = agent.policy.all(feature)
    for b, t in ((0, 0), (0, 5), (1, 1), (1, 2), (1, 4)):
        expected = 0.0
        for n in range(3):
            k = t + 1 + n  # row k holds the action that a policy chooses at row k - 1
            if k < 6 and not clip.first[b, t + 1 : k + 1].any() and clip.labelled[b, k]:
                expected -= agent.actions.log_prob(logits[b, t, n], clip.action[b, k])
        assert torch.allclose(loss[b, t], torch.as_tensor(expected), atol=1e-5)


def test_rewards_are_those_from_the_frame_on():
    agent, batch = make(), experience()
    feature = torch.randn(4, 6, agent.dynamics.feature)
    loss = agent._rewards(batch, feature)
    head, logits = twohot(agent.reward), agent.reward.all(feature)
    near = head.loss(logits[1, 2, 0], batch.reward[1, 2])
    assert torch.allclose(loss[1, 2], near)  # row 3 starts an episode
    assert torch.allclose(loss[0, 0], head.loss(logits[0, 0], batch.reward[0, :3]).sum())
    assert torch.allclose(logits[:, :, 0], agent.reward(feature), atol=1e-6)


def test_finetuning_gives_every_loss_a_row_and_reaches_every_parameter_but_the_value_s():
    agent, batch = make(), experience()
    losses = agent.finetune(batch, seeded())
    assert {name: loss.shape for name, loss in losses.items()} == dict.fromkeys(
        ["dynamics", "policy", "reward", "terminal"], (4, 6)
    )
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    silent = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is None}
    assert silent == {"tokenizer", "value"}
    assert agent.dynamics.agent.grad is not None and agent.dynamics.agent.grad.any()


def test_rows_for_imitation_and_rows_for_dynamics_are_told_apart():
    agent, batch = make(), experience()
    losses = agent.finetune(batch, seeded())
    assert not losses["policy"][2:].any() and losses["policy"][:2].any()
    assert not losses["dynamics"][:2].any() and (losses["dynamics"][2:] > 0).all()
    assert (losses["reward"] > 0).all(1).all()


def test_of_rows_without_labels_nothing_but_frames_is_learned():
    """Neither actions nor rewards nor terminals are read, by any loss or gradient."""
    batch = experience()
    clip = batch.clip._replace(labelled=batch.clip.labelled.clone())
    clip.labelled[2:] = False
    found = []
    for unknown, ends in ((torch.nan, True), (0.0, False)):
        agent = make(members=2)
        rows = clip.labelled
        action = torch.where(rows[..., None], clip.action, unknown)
        reward = torch.where(rows, batch.reward, unknown)
        terminal = torch.where(rows, batch.terminal, torch.tensor(ends))
        blank = batch._replace(clip=clip._replace(action=action), reward=reward, terminal=terminal)
        losses = agent.finetune(blank, seeded())
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        found.append((losses, [p.grad for p in agent.parameters() if p.grad is not None]))
    (losses, grads), (others, same) = found
    for name, loss in losses.items():
        assert torch.equal(loss, others[name]) and loss.isfinite().all(), name
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert not losses["reward"][2:].any() and not losses["terminal"][2:].any()
    assert (losses["dynamics"][2:] > 0).all() and (losses["reward"][:2] > 0).all()


def by_hand(agent: OfflineDreamer, feature: Tensor, action: Tensor) -> dict[str, Tensor]:
    """The losses of imagination, written out."""
    reward = twohot(agent.reward).mean(agent.reward(feature))
    live = 1 - agent.terminal(feature).sigmoid()
    value = agent.value.mean(agent.value(feature))
    ones = torch.ones_like(live)
    returns = lambda_return(reward, 0.997 * live, ones, value, 0.95).detach()
    weight = torch.stack([live[:, : h + 1].prod(1) for h in range(4)], 1).detach()
    logits = agent.policy(feature[:, :4])
    logp = agent.actions.log_prob(logits, action[:, :4])
    kl = agent.actions.kl(logits, logits.detach() + 0.5)
    policy = pmpo(logp, returns - value[:, :4].detach(), kl, weight)
    return {
        "policy": policy,
        "value": weight * agent.value.loss(agent.value(feature[:, :4]), returns),
    }


def test_imagination_s_losses_are_pmpo_near_the_prior_and_the_error_of_returns():
    agent, batch = make(), experience()
    with torch.no_grad():
        feature, action = agent._rollout(batch.clip, seeded())
    assert feature.shape == (4, 5, agent.dynamics.feature) and action.shape == (4, 5, 5)
    prior = {name: p.clone() for name, p in agent.prior().items()}
    bias = "outs.0.bias"
    # logits moved alike change nothing among choices and something among keys
    prior[bias] = prior[bias] + 0.5
    assert torch.allclose(
        functional_call(agent.policy, prior, (feature,)), agent.policy(feature) + 0.5, atol=1e-6
    )
    losses, metrics = agent.imagine(batch.clip, prior, seeded())
    expected = by_hand(agent, feature, action)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.shape == (4, 4)
        assert torch.allclose(loss, expected[name], atol=1e-5), name
    assert metrics["prior_kl"] > 0 and 0 <= metrics["positive"] <= 1


def test_imagination_trains_policy_and_value_alone():
    agent, batch = make(), experience()
    losses, _ = agent.imagine(batch.clip, agent.prior(), seeded())
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    moved = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
    assert moved == {"policy", "value"}


def test_the_prior_is_a_copy():
    agent = make()
    prior = agent.prior()
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(1.0)
    old = copy.deepcopy(agent.policy)
    old.load_state_dict(prior)
    feature = torch.randn(2, agent.dynamics.feature)
    assert not torch.isclose(old(feature), agent.policy(feature)).all()


def rows(batch: Experience, images: Tensor, t: int) -> Batch:
    clip = batch.clip
    user = torch.arange(len(images))
    flags = (batch.reward[:, t], clip.first[:, t], batch.terminal[:, t], user)
    return Batch({"image": images[:, t]}, clip.action[:, t], *flags)


def test_acting_sees_what_was_and_forgets_at_a_start():
    agent, batch = make(), experience()
    images = torch.randint(256, (4, 6, *SIZE), dtype=torch.uint8)
    scene, actions = agent.initial(4, task=1), []
    for t in range(4):
        action, scene = agent.act(scene, rows(batch, images, t), seeded(t))
        actions.append(action)
    assert action.shape == (4, 5)
    assert torch.equal(action[:, :3].sum(-1), torch.ones(4))
    assert scene.past.start.tolist() == [0, 3, 0, 0] and scene.seen.start.tolist() == [0, 3, 0, 0]
    # a row that starts again is where it began
    fresh, _ = agent.act(
        fast.gather(agent.initial(4, task=1), torch.tensor([0, 1, 2, 3])),
        rows(batch, images, 3),
        seeded(3),
    )
    assert torch.equal(fresh[1], actions[3][1])


def test_a_policy_needs_agent_tokens():
    agent = make()
    without = ShortcutDynamics(5, (3, 2), Trunk(16, 3, 2, 1, 2), 2, agents=0)
    with pytest.raises(ValueError, match="agents=0"):
        OfflineDreamer(agent.tokenizer, without, agent.actions)


def test_an_ensemble_learns_the_next_frame_and_nothing_else():
    agent, batch = make(members=3), experience()
    clip = batch.clip
    action = torch.where(clip.labelled[..., None], clip.action, torch.nan)
    losses = agent.finetune(batch._replace(clip=clip._replace(action=action)), seeded())
    assert losses.keys() == {"dynamics", "policy", "reward", "terminal", "ensemble"}
    found = losses["ensemble"]
    counts = torch.ones(4, 6, dtype=torch.bool)
    counts[:, 5] = counts[1, 2] = False  # nothing follows in the same episode
    assert torch.equal(found.detach() > 0, counts)
    found.sum().backward()
    reached = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert reached == {"ensemble"}


def test_doubt_is_paid_for_in_imagination_and_curiosity_earns_it():
    plain, batch = make(members=3), experience()
    plain.finetune(batch, seeded())
    with torch.no_grad():  # rewards of zero, beside which the price is not rounded away
        for parameter in (*plain.reward.outs.parameters(), *plain.value.parameters()):
            parameter.zero_()
    prior, found = plain.prior(), {}
    for doubt in (0.0, 2.0, -2.0):
        agent = make(members=3, doubt=doubt)
        agent.load_state_dict(plain.state_dict())
        found[doubt] = agent.imagine(batch.clip, prior, seeded()).metrics
    doubts = {float(metrics["doubt"]) for metrics in found.values()}
    assert len(doubts) == 1
    change = found[0.0]["imagined_reward"] - found[2.0]["imagined_reward"]
    steps = 4 / 5  # the first of five states was not stepped into
    assert torch.allclose(change, torch.tensor(2 * doubts.pop() * steps), atol=1e-5)
    gain = found[-2.0]["imagined_reward"] - found[0.0]["imagined_reward"]
    assert torch.allclose(change, gain, atol=1e-5)
    assert found[0.0]["imagined_return"] != found[2.0]["imagined_return"]
    with pytest.raises(ValueError, match="needs an ensemble: members=5"):
        make(doubt=1.0)


def test_video_without_actions_trains_the_same_model_through_the_embedding_of_no_action():
    """The dynamics learn from it; policy and action embedding do not."""
    agent, batch = make(), experience()
    agent.dynamics.apart = 0.0  # separate images have no action either

    def gradients(labelled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clip = batch.clip._replace(labelled=labelled)
        clip = clip._replace(
            action=torch.where(labelled[..., None], clip.action, torch.nan),
            first=torch.zeros_like(labelled),
        )
        fresh = copy.deepcopy(agent)
        losses = fresh.finetune(batch._replace(clip=clip), seeded())
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        named = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
        return losses["dynamics"].detach(), named

    known = torch.ones_like(batch.clip.labelled)
    with_actions, one = gradients(known)
    without, two = gradients(~known)
    assert not torch.allclose(with_actions, without)
    action, nothing = "dynamics.from_action.weight", "dynamics.no_action"
    assert one[action].any() and one[nothing].any()
    assert two[nothing].any() and not two[action].any()
    assert not two["dynamics.from_action.bias"].any()
    assert two["dynamics.to_latent.weight"].any()  # the same network learns
    assert all(g.isfinite().all() for g in two.values())
    assert not two["policy.outs.0.weight"].any() and one["policy.outs.0.weight"].any()
