"""How good imagined frames are: PSNR by horizon, and a distance of distributions.

A mean over all that might come is a blur with a good PSNR. So there is a second measure, that of
Fréchet's video distance (arXiv 1812.01717) with features that are at hand: chunks of frames, as
latents of the frozen tokenizer, projected to the principal components of real chunks. Gaussians
with the moments of both are compared.
"""

import numpy as np
import torch
from torch import Tensor

from worldmodel import ShortcutDynamics
from worldmodel.shortcut import Clip


def imagined(
    model: ShortcutDynamics, clip: Clip, watched: int, steps: int, generator: torch.Generator
) -> np.ndarray:
    """Latents (B, T - watched, L, Z) made after the first frames of a clip, with its actions.

    After none, the first is made from nothing.
    """
    context = model.initial(len(clip.first))
    if watched:
        past = Clip(*(x[:, :watched] for x in clip))
        _, context = model.observe(past, context, generator)
    made: list[Tensor] = []
    for t in range(watched, clip.first.shape[1]):
        now = Clip(*(x[:, t : t + 1] for x in clip))
        now = now._replace(latents=torch.full_like(now.latents, torch.nan))  # nobody may read them
        now = now._replace(latents=model.generate(now, context, steps, generator))
        made.append(now.latents)
        _, context = model.observe(now, context, generator)
    return torch.cat(made, 1).numpy()


def psnr(made: np.ndarray, true: np.ndarray) -> np.ndarray:
    """dB of each frame (T,), of the mean squared error over images (B, T, ...) in [0, 255].

    Of the mean error, not the mean of each image's dB: there a frame in which nothing moved would
    count for more than any that did.
    """
    error = np.square(made / 255 - true / 255).mean((0, 2, 3, 4))
    return -10 * np.log10(error.clip(1e-10))


def chunks(latents: np.ndarray, length: int) -> np.ndarray:
    """Latents (B, T, L, Z) cut into chunks of so many frames (N, length L Z), without the rest."""
    count = latents.shape[1] // length
    cut = latents[:, : count * length].astype(np.float64)
    return cut.reshape(len(latents) * count, -1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of normal distributions with the moments of (N, D) and (M, D)."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    one, two = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(mean + np.trace(one) + np.trace(two) - 2 * both)


class Components:
    """Chunks (N, D) on the principal components of real ones."""

    def __init__(self, real: np.ndarray, count: int):
        self.mean = real.mean(0)
        _, _, rows = np.linalg.svd(real - self.mean, full_matrices=False)
        self.axes = rows[:count].T

    def __call__(self, found: np.ndarray) -> np.ndarray:
        return (found - self.mean) @ self.axes
