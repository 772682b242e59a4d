"""Inner gradient steps on chosen parameters of any module, for many users at once.

Each user holds displacements from the slow weights, whole or of low rank, so a slow weight that
moves moves every user with it. First order by default: no gradient goes through an inner step, yet
the slow weights get that of whatever is computed at `weights(state)` (Reptile and first-order
MAML, 1803.02999). `differentiable=True` lets gradients through the inner loop (MAML, 1703.03400;
TTT-E2E, 2512.23675). Users are rows of one vmap; none reads another.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nested import fast

Params: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Params, Any], Tensor]
Rate: TypeAlias = float | Tensor

LEFT, RIGHT = "/left", "/right"  # no parameter has a slash in its name


class AdapterState(NamedTuple):
    """What each user has learned. Every tensor has users first, (B, ...), under these names.

    A parameter's name holds its displacement (B, *shape). Of rank r, where the parameter is seen as
    a matrix (m, n), NAME/left (B, m, r) and NAME/right (B, r, n) are its factors.
    """

    delta: Params
    velocity: Params  # gradients gathered by momentum, of the same names; empty without


class Adapter:
    """v' = momentum v + g;  delta' = (1 - decay) delta - lr v', for the parameters that match.

    `match` is searched in the dotted names of the module's parameters. `loss(params, row)` gives
    one user's scalar from the adapted parameters, by name (`fast.bind(module, params)` runs the
    module with them), and one row of the inputs: a frame, or a window of them. `lr` is one rate, or
    one for each regex of a mapping, of which the first that is found in a name holds; a rate may be
    a tensor that is learned (Meta-SGD, 1707.09835). `clip` bounds the norm of a user's gradient
    over all that it adapts. Each call takes `steps` steps.

    `rank` factors every displacement that gets smaller by it (LoRA, 2106.09685); vectors stay
    whole. `keep` is the share of what the slow weights took in that a displacement keeps when it is
    rebased.
    """

    def __init__(
        self,
        module: nn.Module,
        match: str,
        loss: Loss,
        lr: Rate | Mapping[str, Rate],
        momentum: float = 0.0,
        decay: float = 0.0,
        clip: float = torch.inf,
        steps: int = 1,
        rank: int = 0,
        keep: float = 0.0,
        differentiable: bool = False,
    ):
        named = dict(module.named_parameters())
        self.slow: Params = {name: p for name, p in named.items() if re.search(match, name)}
        if not self.slow:
            raise ValueError(f"adapter: {match!r} matches no parameter of {', '.join(named)}")
        for key, value in (("momentum", momentum), ("decay", decay), ("keep", keep)):
            if not 0 <= value <= 1:
                raise ValueError(f"adapter: {key} is {value}, outside [0, 1]")
        rates = lr if isinstance(lr, Mapping) else {"": lr}
        if clip <= 0 or any(isinstance(x, float | int) and x <= 0 for x in rates.values()):
            raise ValueError(f"adapter: {lr=} and {clip=} must be positive")
        if steps < 1 or rank < 0:
            raise ValueError(f"adapter: {steps=} must be positive and {rank=} not negative")
        self.module, self.clip, self.steps, self.rank = module, clip, steps, rank
        self.momentum, self.decay, self.keep = momentum, decay, keep
        self.differentiable = differentiable
        self._rates = {name: rate_of(name, rates) for name in self.slow}
        self._factored = {
            name: matrix for name, p in self.slow.items() if (matrix := factors(p.shape, rank))
        }

        def inner(delta: Params, slow: Params, row: Any) -> Tensor:
            whole = self._whole(delta)
            return loss({name: p + whole[name] for name, p in slow.items()}, row)

        gradients = torch.func.grad_and_value(inner)
        self._gradients = torch.func.vmap(gradients, in_dims=(0, None, 0))

    def initial(self, batch: int, generator: torch.Generator | None = None) -> AdapterState:
        """The state of `batch` users that have learned nothing.

        The first factors of low rank are drawn from `generator`, so that the first step is in
        expectation that of a whole displacement; the second are zero.
        """
        delta: Params = {}
        for name, p in self.slow.items():
            if name not in self._factored:
                delta[name] = p.new_zeros(batch, *p.shape, requires_grad=False)
                continue
            if generator is None:
                raise ValueError(f"adapter: rank={self.rank} draws factors; pass a generator")
            rows, columns = self._factored[name]
            size = (batch, rows, self.rank)
            drawn = torch.randn(size, generator=generator, dtype=p.dtype, device=generator.device)
            delta[name + LEFT] = drawn.to(p.device) * self.rank**-0.5
            delta[name + RIGHT] = p.new_zeros(batch, self.rank, columns)
        velocity = {name: torch.zeros_like(x) for name, x in delta.items() if self.momentum}
        return AdapterState(delta, velocity)

    def displacements(self, state: AdapterState) -> Params:
        """Each user's way from the slow weights, by parameter: (B, *shape)."""
        return self._whole(state.delta)

    def weights(self, state: AdapterState) -> Params:
        """Each user's weights (B, *shape); the slow ones receive gradient through them."""
        whole = self._whole(state.delta)
        return {name: p + whole[name] for name, p in self.slow.items()}

    def bind(self, state: AdapterState) -> Callable[..., Any]:
        """The module with every user's own weights: arguments and results have users first."""
        weights = self.weights(state)

        def one(params: Params, *args: Any) -> Any:
            return fast.bind(self.module, params)(*args)

        return lambda *args: torch.func.vmap(one)(weights, *args)

    def __call__(
        self,
        state: AdapterState,
        inputs: fast.Tree,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[AdapterState, Tensor]:
        """`steps` inner steps, after going back to the slow weights where `reset` (B,) is set.

        `inputs` is a tree with users first. Gives the state and the losses (B,) before the first
        step. A reset of low rank draws from `generator`, for all users whatever the mask.
        """
        with self.graph():
            if reset is not None:
                state = fast.reset(state, self.initial(len(reset), generator), reset)
            state, losses = self._step(state, inputs)
            for _ in range(self.steps - 1):
                state, _ = self._step(state, inputs)
            return state, losses

    def graph(self) -> torch.set_grad_enabled:
        """Gradients on, for a `with`, only where they go through inner steps and are on already."""
        return torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled())

    def rebase(self, state: AdapterState, moved: Mapping[str, Tensor]) -> AdapterState:
        """Displacements from where the slow weights stood, as ones from where they stand now.

        `moved` is how far they have moved, (*shape) for all users or (B, *shape). All but the share
        `keep` of it is taken out, so that with 0 a user's own weights stay what they were and
        nothing counts twice. Of low rank, as far as the user's first factor reaches it: in least
        squares.
        """
        delta = dict(state.delta)
        for name, way in moved.items():
            if name not in self.slow:
                raise KeyError(f"adapter: {name} moved, but adapted are {', '.join(self.slow)}")
            way = (1 - self.keep) * way.detach()
            if name in self._factored:
                lead = way.shape[: way.dim() - self.slow[name].dim()]
                way = way.reshape(*lead, *self._factored[name])
                seen = torch.pinverse(delta[name + LEFT].detach()) @ way
                delta[name + RIGHT] = delta[name + RIGHT] - seen
            else:
                delta[name] = delta[name] - way
        return state._replace(delta=delta)

    def _whole(self, delta: Params) -> Params:
        """Displacements by parameter, of one user or with users first."""
        whole: Params = {}
        for name, p in self.slow.items():
            if name in self._factored:
                left, right = delta[name + LEFT], delta[name + RIGHT]
                whole[name] = (left @ right).reshape(*left.shape[:-2], *p.shape)
            else:
                whole[name] = delta[name]
        return whole

    def _step(self, state: AdapterState, inputs: fast.Tree) -> tuple[AdapterState, Tensor]:
        gradients, losses = self._gradients(state.delta, self.slow, inputs)
        gradients = clipped(gradients, self.clip)
        velocity = {name: self.momentum * v + gradients[name] for name, v in state.velocity.items()}
        ways = velocity or gradients
        delta: Params = {}
        for name, d in state.delta.items():
            decay = 0.0 if name.endswith(LEFT) else self.decay  # of the product, not of both
            rate = self._rates[name.removesuffix(LEFT).removesuffix(RIGHT)]
            delta[name] = (1 - decay) * d - rate * ways[name]
        return AdapterState(delta, velocity), losses


class WindowState(NamedTuple):
    """An adapter's state, and the rows that its loss sees next."""

    learned: AdapterState
    rows: fast.Tree  # (B, length, ...), the newest last
    seen: Tensor  # (B,) int64, rows since the user's start


class Window:
    """An adapter that takes one row at a time, and whose loss sees the newest `length` of them.

    It steps on a full window and then after each `every` rows: 1 slides (Atlas' Omega rule,
    2505.23735), `length` is a mini-batch (TTT, 2407.04620).
    """

    def __init__(self, adapter: Adapter, length: int, every: int = 1):
        if min(length, every) < 1:
            raise ValueError(f"window: {length=} and {every=} must be positive")
        self.adapter, self.length, self.every = adapter, length, every

    def initial(self, row: fast.Tree, generator: torch.Generator | None = None) -> WindowState:
        """The state of users that have learned and seen nothing, for rows (B, ...) like this."""

        def empty(x: Tensor) -> Tensor:
            return torch.zeros_like(x).unsqueeze(1).repeat(1, self.length, *(1,) * (x.dim() - 1))

        some = fast.leaves(row)[0]
        seen = torch.zeros(len(some), dtype=torch.int64, device=some.device)
        return WindowState(
            self.adapter.initial(len(some), generator), fast.tree_map(empty, row), seen
        )

    def __call__(
        self,
        state: WindowState,
        row: fast.Tree,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[WindowState, Tensor, Tensor]:
        """One row (B, ...), after starting again where `reset` (B,) is set.

        Gives the state, the losses (B,) of the windows that were learned from, 0 for others, and
        who learned (B,).
        """
        with self.adapter.graph():
            if reset is not None:
                state = fast.reset(state, self.initial(row, generator), reset)

            def push(rows: Tensor, x: Tensor) -> Tensor:
                return torch.cat([rows[:, 1:], x.unsqueeze(1)], 1)

            rows, seen = fast.tree_map(push, state.rows, row), state.seen + 1
            due = (seen >= self.length) & ((seen - self.length) % self.every == 0)
            if not due.any():  # most frames of a long window
                some = next(iter(state.learned.delta.values()))
                return WindowState(state.learned, rows, seen), some.new_zeros(len(due)), due
            learned, losses = self.adapter(state.learned, rows)
            learned = fast.where(due, learned, state.learned)
            return WindowState(learned, rows, seen), losses.where(due, 0.0), due

    def scan(
        self,
        state: WindowState,
        rows: fast.Tree,
        resets: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[WindowState, Tensor, Tensor]:
        """All rows (B, T, ...) with resets (B, T): the state, losses (B, T), who learned (B, T)."""
        losses: list[Tensor] = []
        dues: list[Tensor] = []
        for t in range(resets.shape[1]):

            def at(x: Tensor, t: int = t) -> Tensor:
                return x[:, t]

            state, loss, due = self(state, fast.tree_map(at, rows), resets[:, t], generator)
            losses.append(loss)
            dues.append(due)
        return state, torch.stack(losses, 1), torch.stack(dues, 1)


def adapt(
    module: nn.Module,
    loss: Loss,
    inputs: fast.Tree,
    lr: Rate | Mapping[str, Rate],
    match: str = "",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """The module after inner steps from its own weights, one copy for each user of `inputs`.

    Arguments and results of the copies have users first. MAML is three lines:

        adapted = adapt(net, loss, support, lr=0.1, steps=5, differentiable=True)
        (adapted(query) - target).square().mean().backward()
        optimizer.step()

    `loss`, `lr`, `match` and the options are those of `Adapter`.
    """
    adapter = Adapter(module, match, loss, lr, **options)
    users = len(fast.leaves(inputs)[0])
    state, _ = adapter(adapter.initial(users, generator), inputs)
    return adapter.bind(state)


def clipped(gradients: Params, norm: float) -> Params:
    """Gradients (B, ...), each user's scaled down to `norm` over all of them together."""
    if norm == torch.inf:
        return gradients
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    tiny = torch.finfo(squares.dtype).tiny  # the root has a gradient at zero too
    scale = norm / squares.clamp_min(tiny).sqrt().clamp_min(norm)  # (B,)
    return {name: g * scale.view(-1, *(1,) * (g.dim() - 1)) for name, g in gradients.items()}


def factors(shape: torch.Size, rank: int) -> tuple[int, int] | None:
    """A parameter as a matrix (m, n), where factors of this rank are smaller than it."""
    if not rank or len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


def rate_of(name: str, rates: Mapping[str, Rate]) -> Rate:
    """The rate of the first regex that is found in a name."""
    for regex, rate in rates.items():
        if re.search(regex, name):
            return rate
    raise ValueError(f"adapter: {name} has no rate; none of {', '.join(rates)} matches it")
