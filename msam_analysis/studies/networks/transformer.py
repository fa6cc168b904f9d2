"""Transformers: of image patches, and of characters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msam_analysis.studies.networks.network import Network

_STD = 0.02


def vit(
    image: int,
    patch: int,
    dim: int,
    depth: int,
    heads: int,
    *,
    mlp: int | None = None,
    classes: int = 10,
    in_channels: int = 3,
) -> Network:
    r"""Return a vision transformer.

    The image is cut into square patches, each of which a linear map makes a token. A class token comes before them, and
    learned positions are added to all. Then ``depth`` blocks: LayerNorm, self-attention, plus the input; LayerNorm,
    linear, GELU, linear, plus the input. A last LayerNorm; a linear layer of the class token.

    Parameters
    ----------
    image, patch
        Side of an image and of a patch in pixels; the one is a multiple of the other.
    dim
        Width of a token, a multiple of ``heads``.
    depth, heads
        Blocks, and attention heads of each.
    mlp
        Hidden units in a block. Default ``4 * dim``.
    classes
        Default 10: with ``vit(8, 2, 32, 2, 4, in_channels=1)``, 26,538 parameters, a tiny one for the 8×8 digits.
    in_channels
        Default 3.

    Returns
    -------
    Network
        Input ``(N, in_channels, image, image)``; features, after the last LayerNorm, ``(N, T, dim)`` of
        :math:`T = 1 + (\text{image} / \text{patch})^2` tokens, the class token first, which the head picks; output
        ``(N, classes)``. With width :math:`d` and :math:`m` hidden units it has
        :math:`\text{depth} (4 d^2 + 2 d m + 9 d + m) + d\, (\text{in\_channels} \cdot \text{patch}^2 + T + 4)
        + \text{classes}\, (d + 1)` parameters.

    Raises
    ------
    ValueError
        The patch does not divide the image, or the heads the width.

    Notes
    -----
    Dosovitskiy et al. 2021 (arXiv 2010.11929), equations 1 to 4. LayerNorm adds 1e-6 to the variance. Initial weights:
    the patches' map :math:`N(0, 1 / (\text{in\_channels} \cdot \text{patch}^2))`, which suits patches of any size; all
    other matrices, positions and the class token normal with standard deviation 0.02, as in Touvron et al. 2021 (DeiT,
    arXiv 2012.12877); biases zero. The head is not zero, which the original's is.
    """
    if patch < 1 or image < patch or image % patch != 0:
        raise ValueError(f"the patch must divide the image, got a patch of {patch} and an image of {image} pixels")
    embedding = _Patches(image, patch, dim, in_channels)
    blocks = (_Block(dim, heads, mlp or 4 * dim, causal=False, eps=1e-6) for _ in range(depth))
    features = nn.Sequential(embedding, *blocks, nn.LayerNorm(dim, eps=1e-6))
    return Network(features, nn.Sequential(_ClassToken(), _linear(dim, classes)))


def vit_small(patch: int = 32, image: int = 224, classes: int = 1000) -> Network:
    """Return ViT-S: 12 blocks, width 384, 6 heads, 1,536 hidden units; ViT-S/32 by default.

    Parameters
    ----------
    patch, image
        In pixels. Default 32 and 224: 49 patches.
    classes
        Default 1000, ImageNet.

    Returns
    -------
    Network
        As :func:`vit`; ViT-S/32 on 224×224 with 1,000 classes has 22,878,952 parameters.

    Raises
    ------
    ValueError
        The patch does not divide the image.

    Notes
    -----
    Its widths are those of Touvron et al. 2021 (DeiT-S, arXiv 2012.12877, table 1).
    """
    return vit(image, patch, 384, 12, 6, mlp=1536, classes=classes)


def char_transformer(vocabulary: int, dim: int, depth: int, heads: int, context: int) -> Network:
    r"""Return a causal transformer that predicts the next character at every position.

    Characters and positions are embedded and added; ``depth`` blocks as in :func:`vit`, in which a character attends to
    itself and those before it; LayerNorm; a linear layer without bias, of its own weights.

    Parameters
    ----------
    vocabulary
        Number of characters V.
    dim
        Width, a multiple of ``heads``.
    depth, heads
        Blocks, and attention heads of each; a block has ``4 * dim`` hidden units.
    context
        Longest sequence that it takes.

    Returns
    -------
    Network
        Input ``(N, T)`` integers below V, T ≤ ``context``; features, after the last LayerNorm, ``(N, T, dim)``; output
        ``(N, T, V)`` logits of the characters that follow. With width :math:`d` it has
        :math:`\text{depth} (12 d^2 + 13 d) + d\, (2 V + \text{context} + 2)` parameters.

    Raises
    ------
    ValueError
        The heads do not divide the width; in evaluation, a sequence is longer than the context.

    Notes
    -----
    Radford et al. 2019 (GPT-2), with exact GELU and an output that does not share the embedding's weights. LayerNorm
    adds 1e-5 to the variance. Initial weights in their manner: matrices, positions and embeddings normal with standard
    deviation 0.02, and :math:`0.02 / \sqrt{2\, \text{depth}}` where a block adds to its input; biases zero.
    """
    embedding = _Characters(vocabulary, dim, context)
    blocks = [_Block(dim, heads, 4 * dim, causal=True, eps=1e-5) for _ in range(depth)]
    for block in blocks:
        for layer in (block.attention.out, block.contract):
            nn.init.normal_(layer.weight, std=_STD / math.sqrt(2 * depth))
    return Network(nn.Sequential(embedding, *blocks, nn.LayerNorm(dim)), _linear(dim, vocabulary, bias=False))


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class _Attention(nn.Module):
    """Self-attention of several heads, softmax(Q Kᵀ / √d_head) V."""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if heads < 1 or dim % heads != 0:
            raise ValueError(f"the width must be a multiple of the heads, got a width of {dim} and {heads} heads")
        self.heads = heads
        self.causal = causal
        self.qkv = _linear(dim, 3 * dim)
        self.out = _linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # (N, T, 3 dim) -> three of (N, heads, T, dim / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        joined: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return joined

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


class _Block(nn.Module):
    """Attention and a perceptron, each of the normalised input and added to it."""

    def __init__(self, dim: int, heads: int, mlp: int, *, causal: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = _Attention(dim, heads, causal=causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.expand = _linear(dim, mlp)
        self.activation = nn.GELU()
        self.contract = _linear(mlp, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        total: Tensor = x + self.contract(self.activation(self.expand(self.norm2(x))))
        return total


class _Patches(nn.Module):
    """Tokens of an image: the class token, then the patches row by row, with their positions."""

    def __init__(self, image: int, patch: int, dim: int, in_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + (image // patch) ** 2, dim))
        nn.init.normal_(self.projection.weight, std=1 / math.sqrt(in_channels * patch**2))
        nn.init.zeros_(self.projection.get_parameter("bias"))
        nn.init.normal_(self.class_token, std=_STD)
        nn.init.normal_(self.positions, std=_STD)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions


class _ClassToken(nn.Module):
    """The first token of each sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class _Characters(nn.Module):
    """Embedded characters with their positions."""

    def __init__(self, vocabulary: int, dim: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.empty(context, dim))
        nn.init.normal_(self.characters.weight, std=_STD)
        nn.init.normal_(self.positions, std=_STD)

    def forward(self, indices: Tensor) -> Tensor:
        length, context = indices.shape[1], len(self.positions)
        if length > context:
            raise ValueError(
                f"expected sequences of at most {context} characters, got {length}: cut them, or build the network "
                "with a longer context"
            )
        embedded: Tensor = self.characters(indices) + self.positions[:length]
        return embedded
