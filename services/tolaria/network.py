"""The demo's network: small on purpose, so that it has something to gain from growth."""

import torch
from torch import Tensor, nn

from esper.services.tolaria.data import NUM_CLASSES


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
        return self.fc2(torch.relu(self.fc1(h.flatten(1))))  # type: ignore[no-any-return]
