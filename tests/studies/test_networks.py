"""The networks of the studies: parameter counts, shapes, structure, initial weights, derivatives."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.studies.networks import Network, char_transformer, mlp, resnet50, vit, vit_small, wide_resnet


def made(network: Callable[[], Network], seed: int = 0) -> Network:
    with RandomStream(seed):
        return network()


def unmade(network: Callable[[], Network]) -> Network:
    """Return the network without the numbers in it, which large ones need not draw."""
    with torch.device("meta"):
        return network()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- parameter counts: published, and by arithmetic of our own


def wide_resnet_count(depth: int, width: int, classes: int, channels: int) -> int:
    """Convolutions have k² i o weights, BatchNorm 2 c."""
    total, inputs = 9 * channels * 16, 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for block in range((depth - 4) // 6):
            i = inputs if block == 0 else outputs
            total += 2 * i + 9 * i * outputs + 2 * outputs + 9 * outputs**2 + (i * outputs if i != outputs else 0)
        inputs = outputs
    return total + 2 * inputs + classes * (inputs + 1)


def resnet50_count(classes: int, kernel: int) -> int:
    total, inputs = kernel**2 * 3 * 64 + 2 * 64, 64
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        outputs = 4 * inner
        first = inputs * inner + inputs * outputs + 2 * outputs
        others = (blocks - 1) * outputs * inner
        each = 9 * inner**2 + inner * outputs + 4 * inner + 2 * outputs
        total, inputs = total + first + others + blocks * each, outputs
    return total + classes * (inputs + 1)


def transformer_count(d: int, depth: int, m: int) -> int:
    """LayerNorm, queries to values, output, LayerNorm, two linear layers; the last LayerNorm."""
    return depth * (2 * d + 3 * d * (d + 1) + d * (d + 1) + 2 * d + m * (d + 1) + d * (m + 1)) + 2 * d


def vit_count(image: int, patch: int, d: int, depth: int, m: int, classes: int, channels: int) -> int:
    tokens = (image // patch) ** 2 + 1
    return transformer_count(d, depth, m) + d * (channels * patch**2 + 1 + 1 + tokens) + classes * (d + 1)


@dataclass(frozen=True)
class Case:
    make: Callable[[], Network]
    parameters: int
    formula: int
    inputs: tuple[int, ...]
    features: tuple[int, ...]
    outputs: tuple[int, ...]


# Published: 36,536,884 in reports of WRN-28-10 on CIFAR-100; 25,557,032 and 22,878,952 in
# the model tables of torchvision (resnet50) and timm (vit_small_patch32_224).
LARGE = {
    "WRN-16-4": Case(
        lambda: wide_resnet(16, 4),
        2_772_020,
        wide_resnet_count(16, 4, 100, 3),
        (2, 3, 32, 32),
        (2, 256, 8, 8),
        (2, 100),
    ),
    "WRN-28-10": Case(
        lambda: wide_resnet(28, 10),
        36_536_884,
        wide_resnet_count(28, 10, 100, 3),
        (2, 3, 32, 32),
        (2, 640, 8, 8),
        (2, 100),
    ),
    "ResNet-50, CIFAR": Case(resnet50, 23_705_252, resnet50_count(100, 3), (2, 3, 32, 32), (2, 2048, 4, 4), (2, 100)),
    "ResNet-50, ImageNet": Case(
        lambda: resnet50(1000, "imagenet"),
        25_557_032,
        resnet50_count(1000, 7),
        (2, 3, 224, 224),
        (2, 2048, 7, 7),
        (2, 1000),
    ),
    "ViT-S/32": Case(
        vit_small,
        22_878_952,
        vit_count(224, 32, 384, 12, 1536, 1000, 3),
        (2, 3, 224, 224),
        (2, 50, 384),
        (2, 1000),
    ),
}
SMALL = {
    "WRN-10-1, digits": Case(
        lambda: wide_resnet(10, 1, 10, in_channels=1),
        77_562,
        wide_resnet_count(10, 1, 10, 1),
        (4, 1, 8, 8),
        (4, 64, 2, 2),
        (4, 10),
    ),
    "ViT, digits": Case(
        lambda: vit(8, 2, 32, 2, 4, in_channels=1),
        26_538,
        vit_count(8, 2, 32, 2, 128, 10, 1),
        (4, 1, 8, 8),
        (4, 17, 32),
        (4, 10),
    ),
    "MLP": Case(lambda: mlp([64, 32, 16, 10]), 2_778, 65 * 32 + 33 * 16 + 17 * 10, (4, 1, 8, 8), (4, 16), (4, 10)),
    "linear": Case(lambda: mlp([64, 10]), 650, 65 * 10, (4, 64), (4, 64), (4, 10)),
}
CHARACTERS = Case(
    lambda: char_transformer(11, 16, 2, 4, context=6),
    7_040,
    transformer_count(16, 2, 64) + 16 * (11 + 6) + 16 * 11,
    (3, 5),
    (3, 5, 16),
    (3, 5, 11),
)
CASES = LARGE | SMALL | {"characters": CHARACTERS}
TINY = SMALL | {"characters": CHARACTERS}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_tiny_case = pytest.mark.parametrize("case", TINY.values(), ids=TINY)


@each_case
def test_parameters_are_counted(case: Case) -> None:
    assert count(unmade(case.make)) == case.parameters == case.formula


# Zagoruyko and Komodakis 2016, table 4: depth, width, millions of parameters with CIFAR-10's classes.
PUBLISHED = [
    (40, 1, 0.6),
    (40, 2, 2.2),
    (40, 4, 8.9),
    (40, 8, 35.7),
    (28, 10, 36.5),
    (28, 12, 52.5),
    (22, 8, 17.2),
    (22, 10, 26.8),
    (16, 8, 11.0),
    (16, 10, 17.1),
]


@pytest.mark.parametrize(("depth", "width", "millions"), PUBLISHED)
def test_wide_resnets_are_those_of_the_paper(depth: int, width: int, millions: float) -> None:
    assert round(count(unmade(lambda: wide_resnet(depth, width, 10))) / 1e6, 1) == millions


@each_case
def test_docstrings_say_the_shapes(case: Case) -> None:
    network = unmade(case.make)
    dtype = torch.int64 if case is CHARACTERS else torch.float32
    x = torch.zeros(case.inputs, dtype=dtype, device="meta")
    features = network.features(x)
    assert tuple(features.shape) == case.features
    assert tuple(network.head(features).shape) == tuple(network(x).shape) == case.outputs


@pytest.mark.parametrize("side", [30, 33])
def test_images_of_other_sizes(side: int) -> None:
    assert unmade(lambda: wide_resnet(10, 1)).features(torch.empty(1, 3, side, side, device="meta")).shape[2:] == (
        math.ceil(side / 4),
        math.ceil(side / 4),
    )


# --- structure


def convolutions(network: Network, side: int) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, outputs and the side of what comes out, of every convolution in the order in which they run."""
    seen: list[tuple[int, int, int, int]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert module.bias is None
        assert module.kernel_size[0] == module.kernel_size[1]
        seen.append((module.kernel_size[0], module.stride[0], module.out_channels, output.shape[-1]))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    network(torch.empty(1, 3, side, side, device="meta"))
    return seen


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 4), (28, 10)])
def test_convolutions_of_a_wide_resnet(depth: int, width: int) -> None:
    """Depth counts the 3×3 convolutions, the linear layer and the shortcuts of three groups: 3·2n + 1 + 3 = 6n + 4."""
    seen = convolutions(unmade(lambda: wide_resnet(depth, width)), 32)
    wide = [entry for entry in seen if entry[0] == 3]
    blocks = (depth - 4) // 6
    expected = [(3, 1, 16, 32)]
    for channels, stride, side in ((16 * width, 1, 32), (32 * width, 2, 16), (64 * width, 2, 8)):
        expected += [(3, stride, channels, side)] + [(3, 1, channels, side)] * (2 * blocks - 1)
    assert wide == expected
    shortcuts = [(1, 1, 16 * width, 32), (1, 2, 32 * width, 16), (1, 2, 64 * width, 8)]
    # The first group of width 1 has as many channels as the stem, and adds its input as it is.
    assert [entry for entry in seen if entry[0] == 1] == (shortcuts[1:] if width == 1 else shortcuts)


@pytest.mark.parametrize(
    ("stem", "side", "first", "sides"),
    [
        ("cifar", 32, (3, 1, 64, 32), (32, 16, 8, 4)),
        ("imagenet", 224, (7, 2, 64, 112), (56, 28, 14, 7)),
    ],
)
def test_convolutions_of_resnet50(stem: Any, side: int, first: tuple[int, ...], sides: tuple[int, ...]) -> None:
    seen = convolutions(unmade(lambda: resnet50(100, stem)), side)
    # 1 + 3 * (3 + 4 + 6 + 3) layers with the linear one make 50; 4 shortcuts.
    assert len(seen) == 49 + 4
    assert seen[0] == first
    assert [entry for entry in seen if entry[0] == 3][-16:] == [
        (3, 2 if block == 0 and inner != 64 else 1, inner, size)
        for blocks, inner, size in zip((3, 4, 6, 3), (64, 128, 256, 512), sides, strict=True)
        for block in range(blocks)
    ]
    assert [entry[2] for entry in seen if entry[0] == 1 and entry[2] >= 256 and entry[1] == 2] == [512, 1024, 2048]


def by_hand(network: Network, x: Tensor) -> Tensor:
    """WRN-10 in formulas, in training mode: every block by its parameters' names."""
    w = dict(network.named_parameters())

    def normalised(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        weight, bias = (w[f"features.{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return torch.relu((x - mean) / (variance + 1e-5).sqrt() * weight + bias)

    x = F.conv2d(x, w["features.stem.weight"], padding=1)
    for number in (1, 2, 3):
        name, stride = f"group{number}.0", 1 if number == 1 else 2
        first = normalised(x, f"{name}.norm1")
        second = normalised(
            F.conv2d(first, w[f"features.{name}.conv1.weight"], stride=stride, padding=1), f"{name}.norm2"
        )
        if f"features.{name}.shortcut.weight" in w:
            x = F.conv2d(first, w[f"features.{name}.shortcut.weight"], stride=stride)
        x = x + F.conv2d(second, w[f"features.{name}.conv2.weight"], padding=1)
    x = normalised(x, "norm").mean((2, 3))
    return x @ w["head.1.weight"].T + w["head.1.bias"]


@pytest.mark.parametrize("width", [1, 2])
def test_a_wide_resnet_by_hand(width: int) -> None:
    """To 1e-10 in float64, of logits of size 1: a wrong order of its parts is seen in the first digit."""
    network = made(lambda: wide_resnet(10, width, 7)).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=index))
    x = normal(3, 3, 9, 9)
    torch.testing.assert_close(network(x), by_hand(network, x), rtol=0, atol=1e-10)


def test_a_perceptron_by_hand() -> None:
    network = made(lambda: mlp([6, 5, 4, 3], nn.Tanh)).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=index))
    a, b, c, d, e, f = network.parameters()
    x = normal(2, 2, 3)
    hidden = torch.tanh(torch.tanh(x.flatten(1) @ a.T + b) @ c.T + d)
    torch.testing.assert_close(network.features(x), hidden)
    torch.testing.assert_close(network(x), hidden @ e.T + f)
    assert [type(module) for module in made(lambda: mlp([6, 5, 3])).features.children()][-1] is nn.ReLU


def test_dropout_lies_between_the_convolutions_of_a_block() -> None:
    network = made(lambda: wide_resnet(10, 1, 7, dropout=0.25))
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert [layer.p for layer in layers] == [0.25] * 3
    seen: list[tuple[int, ...]] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    network(torch.zeros(1, 3, 8, 8))
    assert seen == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert all(m.p == 0 for m in unmade(lambda: wide_resnet(10, 1)).modules() if isinstance(m, nn.Dropout))


# --- other implementations


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """The library, without torchvision: an installed one need not import beside this torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        yield pytest.importorskip("transformers")


def spread(network: Any) -> Any:
    """Give every parameter numbers of its own, of a size that keeps activations near 1."""
    for index, parameter in enumerate(network.parameters()):
        noise = normal(*parameter.shape, seed=index)
        if parameter.ndim > 1:
            noise = noise / math.sqrt(parameter[0].numel())
        else:
            noise = 0.1 * noise + float((parameter == 1).all())
        parameter.data.copy_(noise)
    return network.double()


def copied(ours: Network, theirs: Any, names: Callable[[str], list[str]]) -> Network:
    """Copy weights: ``names`` translates ours to those that make it up. None may be left over on either side."""
    source = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        found = torch.cat([source.pop(other).detach() for other in names(name)])
        # GPT-2 keeps its linear layers' matrices as inputs by outputs.
        transposed = found.ndim == 2 and ".h." in names(name)[0]
        parameter.data = (found.T if transposed else found).reshape(parameter.shape).clone()
    assert not source
    return ours.double()


def resnet_names(name: str) -> list[str]:
    half, stage, *rest = name.split(".")
    kinds = ("convolution", "normalization")
    if half == "head":
        return [f"classifier.1.{rest[0]}"]
    if stage == "stem":
        return [f"resnet.embedder.embedder.{kinds[int(rest[0])]}.{rest[1]}"]
    block, part, index, kind = rest
    at = f"resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{block}"
    if part == "shortcut":
        return [f"{at}.shortcut.{kinds[int(index)]}.{kind}"]
    return [f"{at}.layer.{int(index) // 3}.{kinds[int(index) % 3]}.{kind}"]


def transformer_names(
    name: str, head: str, whole: dict[str, str], block: dict[str, list[str]], depth: int
) -> list[str]:
    half, stage, *rest = name.split(".")
    kind = rest[-1] if rest else stage
    if half == "head":
        return [f"{head}.{kind}"]
    if stage == "0":
        return [whole[".".join(rest)]]
    if int(stage) == depth + 1:
        return [f"{whole['last']}.{kind}"]
    return [f"{whole['blocks']}.{int(stage) - 1}.{part}.{kind}" for part in block[".".join(rest[:-1])]]


def test_resnet50_is_the_library_s(library: Any) -> None:
    """In training mode first, which leaves running statistics behind for evaluation mode."""
    theirs = spread(library.ResNetForImageClassification(library.ResNetConfig(num_labels=5)))
    ours = copied(made(lambda: resnet50(5, "imagenet")), theirs, resnet_names)
    x = normal(2, 3, 64, 64)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        with torch.no_grad():
            expected = theirs.resnet(x)
            features = ours.features(x)
            assert float(features.std()) > 0.01
            torch.testing.assert_close(features, expected.last_hidden_state, rtol=1e-9, atol=1e-9)
            logits = theirs.classifier(expected.pooler_output)
            torch.testing.assert_close(ours.head(features), logits, rtol=1e-9, atol=1e-9)


def test_vit_is_the_library_s(library: Any) -> None:
    """ViT-S/32's widths at two blocks and 64×64 pixels; the library keeps queries, keys and values apart."""
    config = library.ViTConfig(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=64,
        patch_size=32,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    theirs = spread(library.ViTForImageClassification(config)).eval()
    embeddings = "vit.embeddings."
    whole = {
        "class_token": embeddings + "cls_token",
        "positions": embeddings + "position_embeddings",
        "projection.weight": embeddings + "patch_embeddings.projection.weight",
        "projection.bias": embeddings + "patch_embeddings.projection.bias",
        "blocks": "vit.layers",
        "last": "vit.layernorm",
    }
    block = {
        "norm1": ["layernorm_before"],
        "attention.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
        "attention.out": ["attention.o_proj"],
        "norm2": ["layernorm_after"],
        "expand": ["mlp.fc1"],
        "contract": ["mlp.fc2"],
    }
    ours = made(lambda: vit(64, 32, 384, 2, 6, classes=5))
    copied(ours, theirs, lambda name: transformer_names(name, "classifier", whole, block, 2))
    x = normal(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.vit(x).last_hidden_state
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(ours.features(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-9, atol=1e-9)


def test_the_char_transformer_is_the_library_s(library: Any) -> None:
    config = library.GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=16,
        n_layer=2,
        n_head=4,
        activation_function="gelu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = spread(library.GPT2LMHeadModel(config)).eval()
    whole = {
        "characters.weight": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "blocks": "transformer.h",
        "last": "transformer.ln_f",
    }
    block = {
        "norm1": ["ln_1"],
        "attention.qkv": ["attn.c_attn"],
        "attention.out": ["attn.c_proj"],
        "norm2": ["ln_2"],
        "expand": ["mlp.c_fc"],
        "contract": ["mlp.c_proj"],
    }
    ours = copied(made(CHARACTERS.make), theirs, lambda name: transformer_names(name, "lm_head", whole, block, 2))
    indices = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(indices), theirs(indices).logits, rtol=1e-9, atol=1e-9)


def test_characters_see_what_came_before_alone() -> None:
    network = made(CHARACTERS.make)
    a = torch.tensor([[1, 2, 3, 4, 5, 6]])
    b = torch.tensor([[1, 2, 3, 9, 5, 6]])
    differ = (network(a) != network(b)).any(dim=-1)[0]
    assert differ.tolist() == [False] * 3 + [True] * 3


# --- initial weights


def fan_out(weight: Tensor) -> float:
    return math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))


@pytest.mark.parametrize("network", [lambda: wide_resnet(16, 2), resnet50], ids=["wide", "resnet50"])
def test_convolutions_begin_with_the_variance_of_he(network: Callable[[], Network]) -> None:
    """An estimate of σ from n numbers errs by σ / √(2n); 5 times that."""
    for module in made(network).modules():
        if isinstance(module, nn.Conv2d):
            error = 5 / math.sqrt(2 * module.weight.numel())
            assert float(module.weight.detach().std()) == pytest.approx(fan_out(module.weight), rel=error)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


def test_matrices_of_transformers_begin_small() -> None:
    image, text = made(lambda: vit(8, 2, 64, 2, 4, in_channels=1)), made(lambda: char_transformer(50, 64, 8, 4, 32))
    for network in (image, text):
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias") or parameter.ndim == 1:
                assert bool((parameter == (1 if parameter.ndim == 1 and name.endswith("weight") else 0)).all()), name
                continue
            expected = 0.02
            if name.endswith("projection.weight"):
                expected = 0.5  # 1 / sqrt(1 * 2 * 2)
            elif network is text and name.endswith(("out.weight", "contract.weight")):
                expected = 0.005  # 0.02 / sqrt(2 * 8)
            error = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(expected, rel=error), name


def test_other_initial_weights() -> None:
    perceptron = made(lambda: mlp([200, 100, 10]))
    for name, parameter in perceptron.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            expected = math.sqrt(2 / parameter.shape[1])
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel()))
    head = made(lambda: wide_resnet(10, 1)).head
    assert not head.get_parameter("1.bias").any()
    weight = head.get_parameter("1.weight")
    assert 0.99 / 8 < float(weight.detach().abs().max()) <= 1 / 8  # 64 inputs


@each_tiny_case
def test_the_global_generator_decides_the_weights(case: Case) -> None:
    a, b, other = (torch.nn.utils.parameters_to_vector(made(case.make, seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


# --- derivatives


def small_problem(case: Case) -> tuple[Network, Tensor, Tensor]:
    """Return a network away from its initial zeros, in float64, with inputs and labels."""
    network = made(case.make).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=100 + index))
    if case is CHARACTERS:
        x = torch.randint(11, case.inputs, generator=torch.Generator().manual_seed(1))
        return network, x, x.roll(-1, 1)
    return network, normal(*case.inputs, seed=1), torch.arange(case.inputs[0]) % case.outputs[-1]


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@each_tiny_case
def test_every_parameter_has_a_gradient(case: Case) -> None:
    network, x, y = small_problem(case)
    output = network(x)
    assert output.dtype == torch.float64
    loss(output, y).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.norm()) > 1e-8, name


@each_tiny_case
def test_hessian_vector_products(case: Case) -> None:
    """Against central differences of the gradient, (∇L(w + hv) − ∇L(w − hv)) / 2h, in float64."""
    network, x, y = small_problem(case)
    objective = ma.Objective(network, loss, [(x, y)], batchnorm="batch", second_derivatives="exact")
    w, v = objective.point(), normal(objective.size, seed=2)
    v = v / v.norm()
    h = 1e-5
    expected = (objective.gradient(w + h * v) - objective.gradient(w - h * v)) / (2 * h)
    product = objective.hvp(v)
    assert float((product - expected).norm()) < 1e-5 * float(expected.norm())


# --- errors


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "a depth between two": (
        lambda: wide_resnet(18, 4),
        r"depth of 6n \+ 4 \(10, 16, 22, 28, 40, ...\) and a positive width, got 18",
    ),
    "no block": (lambda: wide_resnet(4, 4), "expected a depth of 6n"),
    "no width": (lambda: wide_resnet(16, 0), "got 16 and 0"),
    "a stem": (lambda: resnet50(10, "mnist"), "expected the stem 'cifar' or 'imagenet', got 'mnist'"),  # type: ignore[arg-type]
    "a patch": (lambda: vit(8, 3, 32, 2, 4), "the patch must divide the image, got a patch of 3 and an image of 8"),
    "a patch too large": (lambda: vit_small(32, 16), "the patch must divide the image"),
    "heads": (lambda: vit(8, 2, 30, 2, 4), "multiple of the heads, got a width of 30 and 4 heads"),
    "no heads": (lambda: char_transformer(5, 8, 1, 0, 4), "got a width of 8 and 0 heads"),
    "a long sequence": (
        lambda: char_transformer(5, 8, 1, 2, 4)(torch.zeros(1, 5, dtype=torch.int64)),
        "at most 4 characters, got 5: cut them, or build the network with a longer context",
    ),
    "one size": (lambda: mlp([3]), r"two or more positive numbers, inputs first and outputs last, got \[3\]"),
    "an empty layer": (lambda: mlp([3, 0, 2]), r"positive numbers.*got \[3, 0, 2\]: pass e.g. \[64, 32, 10\]"),
}


@pytest.mark.parametrize(("call", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), RandomStream(0):
        call()
