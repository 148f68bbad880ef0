"""The hosts: networks that are small on purpose, so that growth can improve them.

N: images, C: channels, S: side in pixels.
"""

import itertools

import torch
from torch import Tensor, nn

from esper.services.tolaria.training.image_data import NUM_CLASSES


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers. x: (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc1 = nn.Linear(channels * 16, hidden)
        self.fc2 = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = torch.relu(self.conv1(x))
        h = nn.functional.max_pool2d(torch.relu(self.conv2(h)), 2)
        logits: Tensor = self.fc2(torch.relu(self.fc1(h.flatten(1))))
        return logits


class Mlp(nn.Module):
    """``depth`` hidden layers and a head, all linear. x: (N, C, S, S) -> logits (N, 10)."""

    def __init__(self, num_inputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        widths = [num_inputs, *[hidden] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = x.flatten(1)
        for layer in self.hidden:
            h = torch.relu(layer(h))
        logits: Tensor = self.head(h)
        return logits


class Cnn(nn.Module):
    """``depth`` 3x3 convolutions, each with 2x2 pooling while the side is above 4; then a mean and a linear head.

    x: (N, C, S, S) -> logits (N, 10).
    """

    def __init__(self, num_channels: int, side: int, channels: int, depth: int) -> None:
        super().__init__()
        widths = [num_channels, *[channels] * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.num_poolings = max(0, side.bit_length() - 3)
        self.head = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = x
        for n, conv in enumerate(self.convs):
            h = torch.relu(conv(h))
            if n < self.num_poolings:
                h = nn.functional.max_pool2d(h, 2)
        return self.head(h.mean((2, 3)))  # type: ignore[no-any-return]
