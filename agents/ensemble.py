"""Where a world model does not know: heads that agree on what was seen, and nowhere else.

A few small networks predict the next latents from what agent tokens see and the action that is
taken. They begin differently and learn the same, so that their variance is what experience has not
settled (Plan2Explore, arXiv 2005.05960; as a price on imagined rewards: MOPO, arXiv 2005.13239).
Doubt is counted in units of what is usual on data: zero there on average, and large off it.
"""

import torch
from torch import Tensor, nn

from worldmodel.mlp import MLP
from worldmodel.nets import at_least_float32
from worldmodel.scale import RunningRMS


class Ensemble(nn.Module):
    """`members` predictions of the next latents (n_out numbers) from features F and actions A."""

    def __init__(
        self, feature: int, action: int, n_out: int, members: int, units: int, layers: int
    ):
        super().__init__()
        if members < 2:
            raise ValueError(f"members={members}: it takes two to disagree")
        n_in, layers = feature + action, max(1, layers)
        self.heads = nn.ModuleList(MLP(n_in, n_out, units, layers) for _ in range(members))
        self.usual = RunningRMS()

    def forward(self, feature: Tensor, action: Tensor) -> Tensor:
        """feature (..., F), action (..., A) -> (E, ..., n_out)."""
        x = torch.cat([feature, action.to(feature.dtype)], -1)
        return at_least_float32(torch.stack([head(x) for head in self.heads]))

    def losses(self, feature: Tensor, action: Tensor, latents: Tensor, weight: Tensor) -> Tensor:
        """Squared error (...) of all members about latents (..., n_out); takes in what is usual.

        No gradient reaches the features. weight (...): which of them count.
        """
        made = self(feature.detach(), action)
        self.usual(deviation(made.detach()), weight)
        return (made - latents).square().mean((0, -1))

    @torch.no_grad()
    def doubt(self, feature: Tensor, action: Tensor) -> Tensor:
        """How much the members disagree (...), over what is usual, less one."""
        usual = self.usual.square.sqrt().clamp(min=self.usual.floor)
        return deviation(self(feature, action)) / usual - 1


def deviation(made: Tensor) -> Tensor:
    """Root mean square (...) over entries of the members' deviation, made (E, ..., n)."""
    return made.var(0, unbiased=False).mean(-1).sqrt()
