"""What flows between the parts of a world model: specs, batches, latents and carries.

Shape legend, used in every file of this package and of agents/:
  B batch (environment slots or replayed sequences)   T time   H imagination horizon
  D deterministic state   S stochastic variables   C classes of each   A encoded action
  E tokens (encoded observation)   F feature that heads read, D + S * C

Row t of a sequence holds the observation at t, the *encoded action that led into it*, and the
reward and flags that came with it. A row with `first` set starts an episode: its action and
reward are zero and nothing before it matters.
"""

from typing import Any, Literal, NamedTuple

from torch import Tensor


class ObsSpec(NamedTuple):
    """One entry of a dictionary observation.

    `image`: uint8 (height, width, channels). `vector`: float32 (n,). `discrete`: int64 of the
    given shape, each entry in [0, classes).
    """

    kind: Literal["image", "vector", "discrete"]
    shape: tuple[int, ...]
    classes: int = 0


class ActionSpec(NamedTuple):
    """An action as one float vector of `dim` entries.

    `discrete`: one one-hot block for each entry of `sizes` (one block: Discrete, more:
    MultiDiscrete). `continuous`: `sizes = (n,)`, entries in [-1, 1], rescaled at the border.
    """

    kind: Literal["discrete", "continuous"]
    sizes: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Entries of the encoded vector."""
        return sum(self.sizes)


class Batch(NamedTuple):
    """Rows of experience; a row has (B, ...), a sequence (B, T, ...)."""

    obs: dict[str, Tensor]
    action: Tensor  # (B, T, A) float32
    reward: Tensor  # (B, T) float32
    first: Tensor  # (B, T) bool
    terminal: Tensor  # (B, T) bool
    user: Tensor  # (B, T) int64


class Latent(NamedTuple):
    """State of the RSSM: what is forgotten at the start of an episode."""

    deter: Tensor  # (B, D)
    stoch: Tensor  # (B, S, C) one-hot samples


NOBODY = -1  # as a user


class Carry(NamedTuple):
    """Everything that continues from step to step: `latent`, the fast weights, and whose they are.

    `fast` is any tree of NamedTuples of tensors with the batch axis first; `()` when there are
    none. `user` (B,) int64 is who was in the last row, NOBODY before the first; `()` where every
    slot is one user and each of its episodes a session.
    """

    latent: Latent
    fast: Any
    user: Any = ()
