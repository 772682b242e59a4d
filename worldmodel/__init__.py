"""World models: what will happen. Tensors in, tensors out."""

from worldmodel.encoder import Decoder, Encoder
from worldmodel.heads import Binary, TwoHot
from worldmodel.model import WorldModel, features
from worldmodel.rssm import RSSM, Dream, Posterior
from worldmodel.types import ActionSpec, Batch, Carry, Latent, ObsSpec

__all__ = [
    "RSSM",
    "ActionSpec",
    "Batch",
    "Binary",
    "Carry",
    "Decoder",
    "Dream",
    "Encoder",
    "Latent",
    "ObsSpec",
    "Posterior",
    "TwoHot",
    "WorldModel",
    "features",
]
