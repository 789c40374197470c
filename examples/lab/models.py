"""The paper's image networks, in torch alone, with a width to make them smaller."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Of the first convolution.
        project: Whether a shortcut that changes shape is a 1x1 convolution with BatchNorm (ResNet-18); otherwise pixels
            are left out and channels of zeros added (ResNet-32).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            self.shortcut = projection if project else Subsample(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.second(self.first(x)) + self.shortcut(x))


class Subsample(nn.Module):
    """Every ``stride``-th pixel, and ``more`` channels of zeros."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def resnet(widths: list[int], blocks: int, *, channels: int, classes: int, project: bool) -> nn.Sequential:
    """A residual network for small images: a stage for each width, halving the image between stages."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inputs, width, 2 if stage and not block else 1, project=project))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(width: int = 64, *, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """The wide CIFAR variant: four stages of two blocks, 64 to 512 channels, no pooling at the start."""
    return resnet([width, 2 * width, 4 * width, 8 * width], 2, channels=channels, classes=classes, project=True)


def resnet32(width: int = 16, *, channels: int = 3, classes: int = 100) -> nn.Sequential:
    """CIFAR's own variant: three stages of five blocks, 16 to 64 channels, shortcuts without parameters."""
    return resnet([width, 2 * width, 4 * width], 5, channels=channels, classes=classes, project=False)


MODELS = {"resnet18": resnet18, "resnet32": resnet32}
