"""Methods by name: schedules of levels with their controls, and published baselines.

Each is a configuration of the project's own levels; hooks compute only what a level is handed
(Fisher rates, renewed weights) or what stands beside the loss (replay, consistency).
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from experiments import plasticity
from experiments.benchmarks.tasks.schedules import (
    accumulated,
    clocked,
    cls_er,
    ewc,
    hare_rates,
    hare_tortoise,
    l2_init,
    plain,
    renewable,
    scaled,
)
from experiments.benchmarks.tasks.streams import Rows, rng
from experiments.benchmarks.tasks.supervised import (
    Hooks,
    Learner,
    Method,
    Params,
    forward,
    layers,
    losses,
)
from timescales.foreach import share


# ---- online EWC --------------------------------------------------------------------------------
class OnlineEwc:
    """One running Fisher over all tasks (Schwarz et al. 2018, arXiv 1805.06370).

    The decay toward the last task's weights is taken implicitly, `z / (1 + z)` with `z = lr ewc F`,
    as `timescales.Weighted` has it. Here the end of a task is told, and the Fisher is that of
    single rows and of all labels; an agent has neither (`presets.online_ewc`).
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.fisher = {name: torch.zeros_like(w) for name, w in learner.params.items()}
        self._rates = {name: torch.zeros_like(w) for name, w in learner.params.items()}

    def rates(self) -> Mapping[str, Params]:
        """Decay of each weight at an update."""
        return {"fisher": self._rates}

    def ended(self, task: int) -> None:
        """Measure the task's Fisher on its last training rows."""
        learner, settings = self._learner, self._learner.settings
        stop = learner.stream.samples
        rows = learner.stream.rows(task, max(0, stop - settings.ewc_rows), stop)
        for name, found in fisher(learner.params, rows).items():
            self.fisher[name].mul_(settings.gamma).add_(found)
        rates = share(list(self.fisher.values()), settings.lr * settings.ewc)
        self._rates = dict(zip(self.fisher, rates, strict=True))


def fisher(params: Mapping[str, Tensor], rows: Rows) -> Params:
    """Diagonal of the Fisher information, mean over rows, for weights (S, in, out), (S, out).

    The expectation over labels is the model's own and exact: no draw. Values are taken as normal
    with variance one. Squared gradients of single rows come from one product a layer and label:
    the gradient of a weight is the outer product of its input and its output's gradient.
    """
    found = {name: torch.zeros_like(w) for name, w in params.items()}
    inputs, outputs, x = [], [], rows.x.detach().requires_grad_()
    with torch.enable_grad():
        for weight, bias in layers(params):
            inputs.append(x.detach())
            outputs.append(torch.baddbmm(bias.detach()[:, None], x, weight.detach()))
            x = outputs[-1].relu()
        x = outputs[-1]
        values = rows.y.is_floating_point()
        logs = x if values else x.log_softmax(-1)
        for label in range(x.shape[-1]):
            share = torch.ones_like(logs[..., :1]) if values else logs[..., label, None].exp()
            grads = torch.autograd.grad(logs[..., label].sum(), outputs, retain_graph=True)
            for i, grad in enumerate(grads):
                square = share.detach() * grad.square()
                entered = inputs[i].square().transpose(1, 2)
                found[f"layers.{i}.weight"] += entered @ square / x.shape[1]
                found[f"layers.{i}.bias"] += square.mean(1)
    return found


# ---- rehearsal ---------------------------------------------------------------------------------
class Reservoir:
    """A uniform sample of all rows so far, for each seed its own (Vitter 1985).

    Each batch is learned together with as many remembered rows (Chaudhry et al. 2019, 1902.10486).
    """

    def __init__(self, learner: Learner) -> None:
        stream, size = learner.stream, learner.settings.memory
        self._stream, self._seeds = stream, np.arange(len(stream.seeds))[:, None]
        sample = stream.rows(0, 0, 1)  # for its types
        self._x = np.zeros((len(stream.seeds), size, stream.inputs), sample.x.numpy().dtype)
        self._y = np.zeros((len(stream.seeds), size), sample.y.numpy().dtype)
        self._count = self._row = 0
        self._draws = np.zeros((len(stream.seeds), 0, 2))

    def begun(self, task: int) -> None:
        """Draw what a task will need: whether and where rows go in, and which come out."""
        stream = self._stream
        draws = [rng(stream.name, seed, "reservoir", task) for seed in stream.seeds]
        self._draws = np.stack([draw.random((stream.samples, 2)) for draw in draws])
        self._row = 0

    def extend(self, rows: Rows) -> Rows:
        """The batch followed by as many remembered rows, none while nothing is remembered."""
        count = rows.y.shape[1]
        draws = self._draws[:, self._row : self._row + count]
        self._row += count
        known = min(self._count, self._x.shape[1])
        places = (draws[..., 0] * known).astype(np.int64)
        old = Rows(*(torch.from_numpy(a[self._seeds, places]) for a in (self._x, self._y)))
        self._add(rows, draws[..., 1])
        if not known:
            return rows
        return Rows(torch.cat([rows.x, old.x], 1), torch.cat([rows.y, old.y], 1))

    def _add(self, rows: Rows, draws: np.ndarray) -> None:
        size, count = self._x.shape[1], draws.shape[1]
        number = self._count + np.arange(count)
        places = np.where(number < size, number, (draws * (number + 1)).astype(np.int64))
        seeds, kept = np.nonzero(places < size)  # row by row: the last of equal places stays
        self._x[seeds, places[seeds, kept]] = rows.x.numpy()[seeds, kept]
        self._y[seeds, places[seeds, kept]] = rows.y.numpy()[seeds, kept]
        self._count += count


class Consistency(Reservoir):
    """CLS-ER: on remembered rows, stay near the average that knows better (arXiv 2201.12604)."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        self._learner = learner

    def penalty(self, rows: Rows, outputs: Tensor) -> Tensor | None:
        """Squared distance of the outputs, row by row to the average that has the less loss."""
        new = self._learner.settings.batch
        if outputs.shape[1] == new:
            return None
        old = Rows(rows.x[:, new:], rows.y[:, new:])
        with torch.no_grad():
            both = [forward(self._learner.timescales.weights(name), old.x)[0]
                    for name in ("plastic", "stable")]  # fmt: skip
            better = losses(both[0], old) < losses(both[1], old)
            target = torch.where(better[..., None], both[0], both[1])
        distance = (outputs[:, new:] - target).square().mean((1, 2))
        return self._learner.settings.consistency * distance


# ---- renewal -----------------------------------------------------------------------------------
def restart(learner: Learner) -> Hooks:
    """Fresh weights at the start of each task but the first: no memory, full plasticity."""

    def begun(task: int) -> None:
        if task:
            learner.renew(learner.fresh(task))

    return Hooks(begun=begun)


def shrink_perturb(learner: Learner) -> Hooks:
    """`shrink w + perturb fresh` at each new task (Ash & Adams 2020, arXiv 1910.08475)."""
    settings = learner.settings

    def begun(task: int) -> None:
        fresh = learner.fresh(task)
        if task:
            learner.renew({
                name: settings.shrink * w.detach() + settings.perturb * fresh[name]
                for name, w in learner.params.items()
            })  # fmt: skip

    return Hooks(begun=begun)


class Renewal:
    """Gives hidden units a new start: fresh weights in, none out, no moments.

    A seed's fresh weights are numbered by the updates at which it took some.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.updates = 0

    def renew(self, chosen: list[Tensor], correct: list[Tensor] | None = None) -> None:
        """Renew the chosen units, (S, H) bool a hidden layer.

        `correct`, (S, H) a layer, is what a unit gave on average: added to the next bias, so that
        its leaving changes the outputs least.
        """
        if not any(bool(units.any()) for units in chosen):
            return
        fresh = self.learner.fresh(self.updates)
        live = {name: w.detach() for name, w in self.learner.params.items()}
        new = dict(live)
        clear = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in live.items()}
        for i, units in enumerate(chosen):
            for name, into in ((f"layers.{i}.weight", units[:, None]), (f"layers.{i}.bias", units)):
                new[name] = torch.where(into, fresh[name], new[name])
                clear[name] |= into
        for i, units in enumerate(chosen):  # last: between two new units there is nothing either
            after, bias = f"layers.{i + 1}.weight", f"layers.{i + 1}.bias"
            if correct is not None:
                left = (units * correct[i])[:, None] @ live[after]
                new[bias] = new[bias] + left[:, 0]
            new[after] = new[after].masked_fill(units[..., None], 0.0)
            clear[after] |= units[..., None]
        self.learner.renew(new, clear)


def redo(learner: Learner) -> Hooks:
    """Every so many updates, renew what is dormant on the batch (Sokar et al., 2302.12902)."""
    renewal, settings = Renewal(learner), learner.settings

    def updated(hidden: list[Tensor]) -> None:
        renewal.updates += 1
        if renewal.updates % settings.redo_every == 0:
            renewal.renew([plasticity.unit_scores(h) <= settings.tau for h in hidden])

    return Hooks(updated=updated)


class ContinualBackprop:
    """Renews, all the time, the units of least use among the mature (Dohare et al. 2024).

    Use is a running mean (0.99) of mean |h| times mean |outgoing weight|. `replacement` times the
    number of mature units gathers step by step, and each whole is a unit renewed.
    """

    DECAY = 0.99

    def __init__(self, learner: Learner) -> None:
        self._renewal, self._settings = Renewal(learner), learner.settings
        seeds = len(learner.stream.seeds)
        shapes = [(seeds, units) for units in learner.sizes[1:-1]]
        self.use, self.mean, self.age = ([torch.zeros(s, dtype=learner.dtype) for s in shapes]
                                         for _ in range(3))  # fmt: skip
        self._owed = [torch.zeros(seeds, dtype=learner.dtype) for _ in shapes]

    def updated(self, hidden: list[Tensor]) -> None:
        """Take in the units of an update, and renew what is due."""
        self._renewal.updates += 1
        weights = layers(self._renewal.learner.params)
        chosen = []
        for i, units in enumerate(hidden):
            out = weights[i + 1][0].detach().abs().mean(-1)
            self.age[i] += 1
            self.use[i].lerp_(units.abs().mean(1) * out, 1 - self.DECAY)
            self.mean[i].lerp_(units.mean(1), 1 - self.DECAY)
            chosen.append(self._least(i))
        correct = [self.mean[i] / self._warm(i) for i in range(len(hidden))]
        self._renewal.renew(chosen, correct)
        for i, units in enumerate(chosen):
            for tally in (self.use[i], self.mean[i], self.age[i]):
                tally.masked_fill_(units, 0.0)

    def _least(self, i: int) -> Tensor:
        """The unit of least use in each seed that owes one, as a mask (S, H)."""
        mature = self.age[i] > self._settings.maturity
        self._owed[i] += self._settings.replacement * mature.sum(-1)
        due = (self._owed[i] >= 1.0) & mature.any(-1)
        self._owed[i] -= due.to(self._owed[i])
        use = (self.use[i] / self._warm(i)).masked_fill(~mature, torch.inf)
        least = torch.zeros_like(mature)
        return least.scatter_(-1, use.argmin(-1, keepdim=True), due[:, None])

    def _warm(self, i: int) -> Tensor:
        """What a running mean has gathered of its weight (S, H)."""
        return (1.0 - self.DECAY ** self.age[i]).clamp_min(1.0 - self.DECAY)


# ---- by name -----------------------------------------------------------------------------------
def _ewc_hooks(learner: Learner) -> Hooks:
    online = OnlineEwc(learner)
    return Hooks(rates=online.rates, ended=online.ended)


def _reservoir_hooks(learner: Learner) -> Hooks:
    memory = Reservoir(learner)
    return Hooks(begun=memory.begun, extend=memory.extend)


def _cls_er_hooks(learner: Learner) -> Hooks:
    memory = Consistency(learner)
    return Hooks(begun=memory.begun, extend=memory.extend, penalty=memory.penalty)


METHODS = {
    "plain": Method("k=1: every parameter at every update", plain),
    "k2": Method("k=2 by depth, periods 1 and 16", partial(clocked, k=2, base=16)),
    "k3": Method("k=3 by depth, periods 1, 4, 16", partial(clocked, k=3, base=4)),
    "k5": Method("k=5 by depth, periods 1, 2, 4, 8, 16", partial(clocked, k=5, base=2)),
    "k3_rates": Method(
        "control of k3: the same groups at every update, rates scaled to the same travel",
        partial(scaled, k=3, base=4),
    ),
    "accumulate": Method(
        "control: all parameters on the mean gradient of 4 batches", partial(accumulated, n=4)
    ),
    "ewc": Method("online EWC", ewc, _ewc_hooks, boundaries=True),
    "l2_init": Method("decay toward the initial weights", l2_init),
    "shrink_perturb": Method(
        "shrink and perturb at each new task", renewable, shrink_perturb, boundaries=True
    ),
    "redo": Method("renews dormant units", renewable, redo),
    "cbp": Method(
        "continual backprop: renews the least used units",
        renewable,
        lambda learner: Hooks(updated=ContinualBackprop(learner).updated),
    ),
    "hare_tortoise": Method("returns to an average of its own path", hare_tortoise),
    "hare_rates": Method("control of hare_tortoise: the rate with which it travels", hare_rates),
    "reservoir": Method("rehearses a uniform sample of the past", plain, _reservoir_hooks),
    "cls_er": Method(
        "rehearsal, two weight averages, consistency", cls_er, _cls_er_hooks, acts="stable"
    ),
    "oracle": Method("k=1 that sees the task's label", plain, oracle=True),
    "fresh": Method(
        "a new agent for each task: the reference of plasticity",
        partial(renewable, clear_rule=True),
        restart,
        boundaries=True,
    ),
}
