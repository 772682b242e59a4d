"""Open-loop prediction: what a trained world model believes will come, beside what did.

A fresh episode is acted in environments of its own; the model filters a few frames of it, then
imagines on with the recorded actions and never looks again. `save_prediction` draws that: rows of
frames for images, curves for vectors. Nothing that training holds is touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from experiments.config import Config
from experiments.driver import Arrays, Driver, replayed_batch
from experiments.envs import Row, make_envs
from experiments.record.curves import FAINT, INK, PALETTE
from worldmodel import Batch, ObsSpec
from worldmodel.nets import symexp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATIENCE = 4  # lengths of a sequence to wait for an episode that is long enough
MARGIN = 2  # pixels around a frame: blue where the model saw it, orange where it imagined it
SEEN, IMAGINED, EMPTY = (0, 114, 178), (213, 94, 0), (236, 236, 236)
MOST_CURVES = 8


class Prediction(NamedTuple):
    """Truth and model {key: (N, T, ...)} in units of the observations; images are uint8.

    The first `context` rows were filtered, the others imagined. `live` (N, T) is False behind the
    end of an episode: there is no truth there.
    """

    truth: Arrays
    model: Arrays
    live: np.ndarray
    context: int

    @property
    def horizon(self) -> int:
        """Steps imagined."""
        return self.live.shape[1] - self.context


def predict(
    config: Config, agent: Dreamer, context: int = 5, horizon: int = 20, sequences: int = 3
) -> Prediction:
    """Filter `context` frames of `sequences` episodes and imagine `horizon` more.

    Where every episode is too short for that, the context shrinks to half of the longest one.
    """
    seed = int(np.random.SeedSequence([config.seed, 2]).generate_state(1)[0])
    generator = torch.Generator(next(agent.parameters()).device).manual_seed(seed)
    rows = act(config, agent, generator, sequences, context + horizon, seed)
    columns, live = longest_episodes(rows, context + horizon)
    if not live[:, -1].any():
        context = min(context, max(1, int(live.sum(1).max()) // 2))
    batch = replayed_batch(columns, generator.device)
    truth = {key.removeprefix("obs."): x for key, x in columns.items() if key.startswith("obs.")}
    return Prediction(truth, open_loop(agent, batch, context, generator), live, context)


def act(
    config: Config, agent: Dreamer, generator: torch.Generator, num: int, length: int, seed: int
) -> list[Row]:
    """Rows of `num` slots, until each had an episode of `length` rows or patience ends."""
    envs = make_envs(config.env.model_copy(update={"workers": "inprocess"}), num, seed)
    driver = Driver(agent, envs, generator)
    age, enough = np.zeros(num, np.int64), np.zeros(num, bool)
    rows: list[Row] = []
    try:
        driver.reset(config.env.contexts[-1] if config.env.contexts else None)
        while not enough.all() and len(rows) < PATIENCE * length:
            rows.append(driver.step().row)
            age = np.where(rows[-1].first, 1, age + 1)
            enough |= age >= length
    finally:
        envs.close()
    return rows


def longest_episodes(rows: list[Row], length: int) -> tuple[Arrays, np.ndarray]:
    """The longest episode of each slot as columns (N, length, ...), and which rows are in it."""
    first = np.stack([row.first for row in rows], 1)
    index, live = [], []
    for slot in first:
        starts = np.flatnonzero(slot)
        lengths = np.diff(np.append(starts, len(slot)))
        best = int(np.argmax(lengths))
        steps = np.minimum(np.arange(length), lengths[best] - 1)
        index.append(starts[best] + steps)
        live.append(np.arange(length) < lengths[best])
    slots, index = np.arange(len(first))[:, None], np.stack(index)

    def pick(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values, 1)[slots, index]

    columns = {f"obs.{key}": pick([row.obs[key] for row in rows]) for key in rows[0].obs}
    names = Batch._fields[1:]
    columns |= {name: pick([getattr(row, name) for row in rows]) for name in names}
    return columns, np.stack(live)


@torch.no_grad()
def open_loop(agent: Dreamer, batch: Batch, context: int, generator: torch.Generator) -> Arrays:
    """Decoded states of rows (N, T, ...): filtered up to `context`, then imagined."""
    world, (num, length) = agent.world, batch.first.shape
    seen = Batch(
        {k: v[:, :context] for k, v in batch.obs.items()}, *(x[:, :context] for x in batch[1:])
    )
    posterior, carry = world.observe(seen, agent.initial(num), generator)
    actions = iter(batch.action[:, context:].unbind(1))
    dream = world.dynamics.imagine(
        carry, lambda _: next(actions), length - context, agent.imagine_memory, generator
    )
    imagined = torch.cat([dream.feature[:, 1:], dream.last[:, None]], 1)
    dreamt = world.dynamics.states(imagined)
    deter = torch.cat([posterior.deter, dreamt[0]], 1)
    stoch = torch.cat([posterior.stoch, dreamt[1]], 1)
    decoded = world.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))
    spec = world.decoder.spec
    observed = {key: observation(value, spec[key]) for key, value in decoded.items()}
    return {k: v.view(num, length, *spec[k].shape).cpu().numpy() for k, v in observed.items()}


def observation(decoded: Tensor, spec: ObsSpec) -> Tensor:
    """What the decoder says (N, ...), in the units and the dtype of the observation."""
    if spec.kind == "image":
        return (decoded.float().sigmoid() * 255).round().to(torch.uint8)
    if spec.kind == "vector":
        return symexp(decoded.float())
    return decoded.unflatten(-1, (-1, spec.classes)).argmax(-1)


# ---- how good ----------------------------------------------------------------------------------
def images_of(prediction: Prediction) -> list[str]:
    """The keys that hold images."""
    return [key for key, value in prediction.truth.items() if value.ndim == 5]


def psnr(prediction: Prediction, key: str) -> dict[int, float]:
    """Peak signal-to-noise ratio (dB) of an image by imagined step, 1 the first.

    Of the squared error's mean over the sequences that are still alive; steps without any are
    left out.
    """
    errors = squared_error(prediction, key, 255.0)
    return {step: float(-10 * np.log10(max(error, 1e-10))) for step, error in errors.items()}


def rmse(prediction: Prediction, key: str) -> dict[int, float]:
    """Root mean squared error of a vector by imagined step, 1 the first."""
    errors = squared_error(prediction, key, 1.0)
    return {step: float(np.sqrt(error)) for step, error in errors.items()}


def squared_error(prediction: Prediction, key: str, peak: float) -> dict[int, float]:
    """Mean squared error in units of `peak`, by imagined step."""
    difference = prediction.truth[key].astype(np.float64) - prediction.model[key]
    square = np.square(difference / peak).reshape(*prediction.live.shape, -1).mean(-1)
    steps = range(prediction.context, prediction.live.shape[1])
    alive = {t: prediction.live[:, t] for t in steps}
    return {
        t - prediction.context + 1: float(square[rows, t].mean())
        for t, rows in alive.items()
        if rows.any()
    }


# ---- the picture -------------------------------------------------------------------------------
def prediction_grid(prediction: Prediction, key: str) -> np.ndarray:
    """One picture (height, width, 3) uint8: for each sequence the rows truth, model and error.

    Errors are absolute, black where there is none. The frame of a column is blue where the model
    saw that moment and orange where it imagined it.
    """
    truth, model = (rgb(x[key]) for x in (prediction.truth, prediction.model))
    error = np.abs(truth.astype(np.int16) - model).astype(np.uint8)
    strips = [
        strip(images[n], prediction.live[n], prediction.context)
        for n in range(len(truth))
        for images in (truth, model, error)
    ]
    space = np.full((2 * MARGIN, *strips[0].shape[1:]), 255, np.uint8)
    groups = [np.concatenate([*strips[i : i + 3], space]) for i in range(0, len(strips), 3)]
    return np.concatenate(groups)[: -len(space)]


def strip(images: np.ndarray, live: np.ndarray, context: int) -> np.ndarray:
    """Frames (T, H, W, 3) side by side, each in the border that tells how it came about."""
    tiles = []
    for t, image in enumerate(images):
        border = SEEN if t < context else IMAGINED
        height, width, _ = image.shape
        tile = np.empty((height + 2 * MARGIN, width + 2 * MARGIN, 3), np.uint8)
        tile[:] = border if live[t] else EMPTY
        tile[MARGIN:-MARGIN, MARGIN:-MARGIN] = image if live[t] else EMPTY
        tiles.append(tile)
    return np.concatenate(tiles, 1)


def rgb(images: np.ndarray) -> np.ndarray:
    """Three channels of any number: grey is repeated, of a stack of frames the last is shown."""
    channels = images.shape[-1]
    if channels == 3:
        return images
    newest = images[..., -3:] if channels % 3 == 0 else images[..., -1:]
    return np.broadcast_to(newest, (*images.shape[:-1], 3))


def save_prediction(config: Config, agent: Dreamer, path: Path) -> dict[int, float]:
    """Write the picture to `path`; returns PSNR (images) or RMSE (vectors) by imagined step."""
    from matplotlib import rc_context

    from experiments.record.curves import STYLE

    prediction = predict(config, agent)
    images = images_of(prediction)
    key = images[0] if images else next(iter(prediction.truth))
    quality = psnr(prediction, key) if images else rmse(prediction, key)
    with rc_context(STYLE):
        draw = draw_frames if images else draw_curves
        draw(prediction, key, quality).savefig(path, dpi=100, facecolor="white")
    return quality


def draw_frames(prediction: Prediction, key: str, quality: Mapping[int, float]) -> "Figure":
    """The grid with its rows named, and PSNR against the imagined step below."""
    from matplotlib.figure import Figure

    picture = prediction_grid(prediction, key)
    width = 16.0
    high = 0.9 * width * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(width, high + 3.4))
    total = high + 3.4
    grid = figure.add_axes((0.07, 2.5 / total, 0.91, high / total))
    grid.imshow(picture, aspect="auto", interpolation="nearest")
    name_rows(grid, prediction, picture.shape)
    title = (
        f"{key}: {prediction.context} frames seen (blue), {prediction.horizon} imagined (orange)"
    )
    figure.text(0.07, 1 - 0.42 / total, title, fontsize=14, fontweight="bold", color=INK)
    axes = figure.add_axes((0.07, 0.55 / total, 0.91, 1.45 / total))
    axes.plot([*quality], [*quality.values()], color=PALETTE[1], marker="o", markersize=3.5)
    low, top = 0.5 - prediction.context, prediction.horizon + 0.5
    axes.set_xlim(low, top)
    axes.set_xlabel("imagined step")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(axis="y")
    return figure


def name_rows(axes: "Axes", prediction: Prediction, shape: tuple[int, ...]) -> None:
    """Names of the rows at the left of the grid."""
    groups = len(prediction.live)
    gap = 2 * MARGIN
    tall = (shape[0] - gap * (groups - 1)) / (3 * groups)
    places = [(g * (3 * tall + gap) + (i + 0.5) * tall) for g in range(groups) for i in range(3)]
    axes.set_yticks(places, ["truth", "model", "|error|"] * groups)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_curves(prediction: Prediction, key: str, quality: Mapping[int, float]) -> "Figure":
    """Truth and model of each dimension against time: a column a sequence, a row a dimension."""
    from matplotlib.figure import Figure

    truth, model = (
        x[key].reshape(*prediction.live.shape, -1) for x in (prediction.truth, prediction.model)
    )
    rows, columns = min(truth.shape[2], MOST_CURVES), len(truth)
    figure = Figure(figsize=(4.6 * columns + 1, 1.7 * rows + 1.5), layout="constrained")
    last = max(quality, default=0)
    error = f"   RMSE {quality[last]:.3g} at imagined step {last}" if quality else ""
    figure.suptitle(f"{key}: imagined from step {prediction.context} on{error}", fontweight="bold")
    grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    for (row, column), axes in np.ndenumerate(grid):
        live = prediction.live[column]
        steps = np.flatnonzero(live)
        axes.plot(steps, truth[column, live, row], color=INK, linewidth=2.0, label="truth")
        axes.plot(steps, model[column, live, row], color=PALETTE[1], linewidth=1.6, label="model")
        axes.axvline(prediction.context - 0.5, color=FAINT, linewidth=1, linestyle="--")
        axes.set_xlim(0, len(live) - 1)
        axes.set_xlabel("step of the episode" if row == rows - 1 else "")
        axes.set_ylabel(f"{key}[{row}]" if column == 0 else "")
    grid[0, 0].legend(frameon=False, fontsize=8)
    return figure
