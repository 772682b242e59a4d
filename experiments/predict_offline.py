"""Open-loop prediction by an offline agent: what its world model believes will come.

A few frames of held-out recordings are watched, the rest is imagined with the recorded actions and
decoded. Kept as arrays in the run's folder, for pictures that are drawn without the model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.offline import OfflineDreamer
from experiments.counterfactual import watch
from experiments.data.clips import Clips
from experiments.predict import Prediction
from worldmodel.shortcut import Clip

FILE = "prediction.npz"


@torch.no_grad()
def predict_offline(
    agent: OfflineDreamer,
    clips: Clips,
    image: str,
    generator: torch.Generator,
    context: int = 4,
    horizon: int = 12,
    sequences: int = 3,
) -> Prediction:
    """Watch `context` frames of the longest episodes and imagine `horizon` more."""
    longest = sorted(clips.episodes, key=lambda e: -e.length)[:sequences]
    length = context + horizon
    parts = [clips.read(episode, 0, length) for episode in longest]
    steps = [np.minimum(np.arange(length), len(part["first"]) - 1) for part in parts]
    live = np.stack([np.arange(length) < len(part["first"]) for part in parts])
    truth, actions = (
        np.stack([part[key][at] for part, at in zip(parts, steps, strict=True)])
        for key in (f"obs.{image}", "action")
    )
    action = torch.from_numpy(actions).to(generator.device)
    first = torch.zeros(live.shape, dtype=torch.bool, device=generator.device)
    first[:, 0] = True
    seen = torch.from_numpy(truth[:, :context]).to(generator.device)
    watched = watch(agent, seen, action[:, :context], first[:, :context], generator)
    latents, past = [watched.latents], watched.past
    for t in range(context, length):
        no, task = first[:, t : t + 1], torch.zeros_like(first[:, :1], dtype=torch.int64)
        clip = Clip(latents[-1][:, -1:], action[:, t : t + 1], no, ~no, task)
        clip = clip._replace(latents=agent.dynamics.generate(clip, past, agent.steps, generator))
        _, past = agent.dynamics.observe(clip, past, generator)
        latents.append(clip.latents)
    painted = agent.tokenizer.decode(torch.cat(latents, 1), first).clamp(0, 1)
    model = (painted * 255).round().to(torch.uint8).cpu().numpy()
    return Prediction({image: truth}, {image: model}, live, context)


def save(prediction: Prediction, key: str, path: Path) -> None:
    """Arrays of one image, whole or not there."""
    temporary = path.with_name(f"tmp.{path.name}")
    kept = {"live": prediction.live, "context": np.array(prediction.context)}
    arrays: dict[str, Any] = {
        "truth": prediction.truth[key],
        "model": prediction.model[key],
        **kept,
    }
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def load(path: Path) -> Prediction:
    """What `save` wrote, under the key `image`."""
    with np.load(path, allow_pickle=False) as stored:
        truth, model = ({"image": stored[name]} for name in ("truth", "model"))
        return Prediction(truth, model, stored["live"], int(stored["context"]))
