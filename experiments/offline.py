"""Learning from recorded episodes: Dreamer 4's phases, read from top to bottom.

A tokenizer learns the images and is frozen; dynamics learn its latents; imitation, rewards and
terminals are learned inside the same network; policy and value then learn in imagination, near
the policy that imitated. After each phase a measure on held-out episodes, or in the environment,
must pass the phase's gate. Rounds online may follow: the policy acts in the environment, what it
saw joins the data, and the last two phases go on. What a run holds between updates is in
offline_loop.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from agents.offline import following
from experiments.config.dreamer4 import Dreamer4Config
from experiments.offline_loop import Work
from experiments.progress import Progress
from worldmodel.shortcut import Clip
from worldmodel.transformer import Context


def learn(config: Dreamer4Config, resume: Path | None = None) -> Path:
    """Run the phases, or go on with a run; returns the run's folder.

    Raises RunError where a gate is not passed: the run can be resumed with more updates.
    """
    work = Work.resume(config, resume) if resume else Work.start(config)
    for name in work.new:
        print(f"new {name}", file=sys.stderr)
    with Progress(work.run.path, config, "updates") as progress, work:
        work.show = progress.show
        for stage in work.stages():
            progress.tell("stage", f"round {stage.round}, {stage.name}")
            STAGES[stage.name](work)
    return work.run.path


def tokenizer(work: Work) -> None:
    """Images to latents and back."""
    model, phase, lessons = work.agent.tokenizer, work.config.phases.tokenizer, work.lessons
    for _ in work.updates(phase, r"^tokenizer\."):
        images, first = lessons.images(lessons.data, phase.batch, phase.length)
        work.learn(model.losses(images, first, work.generator), model.scales)
    found = psnr(work)
    work.gate("psnr", found, lambda gate: found >= gate)


def dynamics(work: Work) -> None:
    """The next latents from those before and actions, by shortcut forcing; lengths alternate."""
    phase, lessons = work.config.phases.dynamics, work.lessons
    for _ in work.updates(phase, r"^dynamics\.(?!agent|task)"):
        length = phase.length if work.update % phase.every else phase.long
        batch = lessons.experience([(lessons.data, phase.batch)], length)
        losses, _ = work.agent.dynamics.losses(batch.clip, work.generator)
        work.learn(losses, {"dynamics": 1.0})
    found = next_frame(work)
    work.gate("next_frame", found, lambda gate: found <= gate)


def act(work: Work) -> None:
    """Episodes of the policy, in the environment: more to learn from, beside the recordings."""
    work.act()


def finetune(work: Work) -> None:
    """Imitation of the best recordings, rewards and terminals of all, beside the dynamics' loss."""
    phase, lessons, extra = work.settings, work.lessons, work.config.phases.finetune
    match = r"^(dynamics|policy|reward|terminal|ensemble)\."
    for _ in work.updates(phase, match, "imitation", extra.evaluate):
        rows = min(max(1, round(extra.imitate * phase.batch)), phase.batch - 1)
        parts = [(lessons.best, rows), *lessons.mixed(phase.batch - rows)]
        losses = work.agent.finetune(lessons.experience(parts, phase.length), work.generator)
        work.learn(losses, work.config.scales)
    work.prior = work.agent.prior()
    work.evaluate("imitation")
    found = surprise(work)
    work.gate("surprise", found, lambda gate: found <= gate)


def imagine(work: Work) -> None:
    """Policy and value in imagination; the world model and the prior stand still."""
    phase, lessons, extra = work.settings, work.lessons, work.config.phases.imagine
    for _ in work.updates(phase, r"^(policy|value)\.", "imagination", extra.evaluate):
        clip = lessons.experience(lessons.mixed(phase.batch), phase.length).clip
        dream = work.agent.imagine(clip, work.prior, work.generator)
        learning = float(work.update >= extra.critic)
        work.learn(dream.losses, {"policy": learning, "value": 1.0}, dream.metrics)
    found = work.evaluate("imagination")
    work.measure()
    work.gate("return", found, lambda gate: found >= gate)


# ---- what gates measure ------------------------------------------------------------------------
def psnr(work: Work) -> float:
    """Peak signal to noise of frames held out, in dB, with nothing hidden."""
    phase, model = work.config.phases.tokenizer, work.agent.tokenizer
    images, first = work.lessons.images(work.lessons.held, 16, phase.length)
    with torch.no_grad():
        painted = model.decode(model.encode(images, first), first).clamp(0, 1)
    error = (painted - images / 255).square().mean()
    return float(-10 * error.clamp(min=1e-10).log10())


def next_frame(work: Work) -> float:
    """Squared error of a next frame held out, over that of repeating the one before."""
    clip = held_out(work, work.config.phases.dynamics.length)
    past, (_, context) = observed(work, clip)
    now = Clip(*(x[:, -1:] for x in clip))
    made = work.agent.dynamics.generate(now, context, work.config.agent.steps, work.generator)
    error, still = (error_of(x, now.latents) for x in (made, past.latents[:, -1:]))
    inside = ~now.first[:, 0]
    return float((error * inside).sum() / (still * inside).sum().clamp(min=1e-12))


def surprise(work: Work) -> float:
    """Surprise about actions held out, over that of a policy that chooses uniformly."""
    agent = work.agent
    clip = held_out(work, work.config.phases.finetune.length)
    with torch.no_grad():
        feature, _ = agent.dynamics.observe(clip, agent.dynamics.initial(64), work.generator)
        logits = agent.policy(feature)
    action, same = following(clip.action, clip.first, 1, 1)
    known, _ = following(clip.labelled, clip.first, 1, 1)
    counts = same & known
    action = torch.where(counts[..., None], action, 0.0)
    found, uniform = (
        (agent.actions.log_prob(x, action[:, :, 0]) * counts[:, :, 0]).sum()
        for x in (logits, torch.zeros_like(logits))
    )
    return float(found / uniform)


def held_out(work: Work, length: int) -> Clip:
    """64 rows of the recordings that nothing was learned from."""
    return work.lessons.experience([(work.lessons.held, 64)], length).clip


def observed(work: Work, clip: Clip) -> tuple[Clip, tuple[Tensor, Context]]:
    """All frames of a clip but the last, and what the dynamics make of them."""
    past = Clip(*(x[:, :-1] for x in clip))
    start = work.agent.dynamics.initial(len(clip.first))
    return past, work.agent.dynamics.observe(past, start, work.generator)


def error_of(made: Tensor, true: Tensor) -> Tensor:
    """Squared error of each row (B,)."""
    return (made - true).square().flatten(1).mean(1)


STAGES: dict[str, Callable[[Work], None]] = {
    "tokenizer": tokenizer,
    "dynamics": dynamics,
    "act": act,
    "finetune": finetune,
    "imagine": imagine,
}
