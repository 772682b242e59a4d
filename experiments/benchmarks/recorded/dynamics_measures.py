"""How good imagined frames are: PSNR by horizon, and a distance of distributions.

A mean over all that might come is a blur with a good PSNR. So there is a second measure, that of
Fréchet's video distance (arXiv 1812.01717) with features that are at hand: chunks of frames, as
latents of the frozen tokenizer, what they show and how they move, on the principal components of
real chunks. Gaussians with the moments of both are compared.
"""

import time

import numpy as np
import torch
from torch import Tensor

from worldmodel import ShortcutDynamics
from worldmodel.shortcut import Clip


def imagined(
    model: ShortcutDynamics, clip: Clip, watched: int, steps: int, generator: torch.Generator
) -> tuple[np.ndarray, float]:
    """Latents (B, T - watched, L, Z) made after the first frames of a clip, with its actions.

    After none, the first is made from nothing. Also the CPU seconds of a frame, for all rows.
    """
    context = model.initial(len(clip.first))
    if watched:
        past = Clip(*(x[:, :watched] for x in clip))
        _, context = model.observe(past, context, generator)
    made: list[Tensor] = []
    begun = time.process_time()
    for t in range(watched, clip.first.shape[1]):
        now = Clip(*(x[:, t : t + 1] for x in clip))
        now = now._replace(latents=torch.full_like(now.latents, torch.nan))  # nobody may read them
        now = now._replace(latents=model.generate(now, context, steps, generator))
        made.append(now.latents)
        _, context = model.observe(now, context, generator)
    return torch.cat(made, 1).numpy(), (time.process_time() - begun) / len(made)


def psnr(made: np.ndarray, true: np.ndarray) -> np.ndarray:
    """dB of each frame (T,), of the mean squared error over images (B, T, ...) in [0, 255].

    Of the mean error, not the mean of each image's dB: there a frame in which nothing moved would
    count for more than any that did.
    """
    error = np.square(made / 255 - true / 255).mean((0, 2, 3, 4))
    return -10 * np.log10(error.clip(1e-10))


def chunks(latents: np.ndarray, length: int) -> np.ndarray:
    """Latents (B, T, L, Z) cut into chunks of so many frames (N, length, L Z), without the rest."""
    count = latents.shape[1] // length
    cut = latents[:, : count * length].astype(np.float64)
    return cut.reshape(len(latents) * count, length, -1)


class Features:
    """Chunks (N, T, D) as what they show and how they move, (N, 2 count).

    What they show is the mean of their frames, how they move are the differences of neighbours;
    each in units of its deviation in real chunks, on as many principal components of those. In one
    piece the places of things, which differ most and never move, would be all that is compared;
    with few components a picture that flickers everywhere passes for a real one.
    """

    def __init__(self, real: np.ndarray, count: int):
        self.maps: list[tuple[np.ndarray, np.ndarray]] = []
        for part in parts(real):
            mean = part.mean(0)
            scale = np.sqrt(np.square(part - mean).sum(1).mean())
            _, _, rows = np.linalg.svd(part - mean, full_matrices=False)
            self.maps.append((mean, rows[:count].T / scale))

    def __call__(self, found: np.ndarray) -> np.ndarray:
        pairs = zip(parts(found), self.maps, strict=True)
        return np.concatenate([(part - mean) @ axes for part, (mean, axes) in pairs], 1)


def parts(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What chunks (N, T, D) show (N, D), and how they move (N, (T - 1) D)."""
    return found.mean(1), np.diff(found, axis=1).reshape(len(found), -1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of normal distributions with the moments of (N, D) and (M, D)."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    one, two = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(mean + np.trace(one) + np.trace(two) - 2 * both)
