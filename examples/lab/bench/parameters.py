"""Parameters of the shapes of well-known networks: what a sync costs depends on nothing else of them."""

from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, ...]


def resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> list[Shape]:
    """Shapes of a ResNet for ImageNet (He et al. 2016, Table 1)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]

    def convolution(inputs: int, outputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                convolution(inputs, width, 1)
                convolution(width, width, 3)
                convolution(width, outputs, 1)
            else:
                convolution(inputs, width, 3)
                convolution(width, outputs, 3)
            if not block and inputs != outputs:
                convolution(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def gpt2_small() -> list[Shape]:
    """Shapes of the smallest GPT-2 (12 layers of width 768, the output tied to the embedding)."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    layer: list[Shape] = [
        *norm,
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],
        *norm,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *(12 * layer), *norm]


MODELS: dict[str, list[Shape]] = {
    "ResNet-18": resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": resnet((3, 4, 6, 3), bottleneck=True),
    "GPT-2 small": gpt2_small(),
    "one tensor of 40M": [(40_000_000,)],
    "1,000 vectors of 100": 1000 * [(100,)],
    "1,000 matrices of 10x10": 1000 * [(10, 10)],
}
SMOKE: dict[str, list[Shape]] = {"one tensor": [(1000,)], "10 vectors": 10 * [(10,)]}


def parameters(shapes: list[Shape], device: str = "cpu") -> list[nn.Parameter]:
    """Parameters with random values and gradients of zero that take no memory."""
    made = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.zeros((), device=device).expand(parameter.shape)
    return made
