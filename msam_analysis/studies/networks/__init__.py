"""Networks of the paper and small ones of the same kinds, in torch alone.

Every function returns an untrained :class:`Network`: ``network(x)`` are the logits, ``network.features(x)`` the last
block's features before pooling, and ``network.head`` makes logits of them. Initial weights come from torch's global
generator: put a stream of your own behind it with :class:`msam_analysis.objective.randomness.RandomStream`.
"""

from __future__ import annotations

from msam_analysis.studies.networks.mlp import mlp
from msam_analysis.studies.networks.network import Network
from msam_analysis.studies.networks.resnet import resnet50
from msam_analysis.studies.networks.transformer import char_transformer, vit, vit_small
from msam_analysis.studies.networks.wide_resnet import wide_resnet

__all__ = ["Network", "char_transformer", "mlp", "resnet50", "vit", "vit_small", "wide_resnet"]
