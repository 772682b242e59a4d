"""World models: what will happen. Tensors in, tensors out."""

from worldmodel.encoder import Decoder, Encoder
from worldmodel.heads import Binary, TwoHot
from worldmodel.model import WorldModel, features
from worldmodel.rssm import RSSM, Dream, Posterior
from worldmodel.shortcut import Clip, Imagined, ShortcutDynamics
from worldmodel.tokenizer import Tokenizer
from worldmodel.transformer import Context, Transformer, Trunk
from worldmodel.types import ActionSpec, Batch, Carry, Latent, ObsSpec

__all__ = [
    "RSSM",
    "ActionSpec",
    "Batch",
    "Binary",
    "Carry",
    "Clip",
    "Context",
    "Decoder",
    "Dream",
    "Encoder",
    "Imagined",
    "Latent",
    "ObsSpec",
    "Posterior",
    "ShortcutDynamics",
    "Tokenizer",
    "Transformer",
    "Trunk",
    "TwoHot",
    "WorldModel",
    "features",
]
