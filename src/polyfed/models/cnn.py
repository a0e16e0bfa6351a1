"""The five convolutional networks of FedMRL's experiments.

References:
    Yi et al., "Federated Model Heterogeneous Matryoshka Representation Learning", NeurIPS 2024,
    https://arxiv.org/abs/2406.00488, Table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError

#: name -> (channels of the second convolution, width of the first dense layer)
SIZES = {
    "cnn1": (32, 2000),
    "cnn2": (16, 2000),
    "cnn3": (32, 1000),
    "cnn4": (32, 800),
    "cnn5": (32, 500),
}

_SMALLEST = 16


class CNN(nn.Module):
    """Two 5x5 convolutions without padding, each with ReLU and 2x2 pooling, then three dense layers.

    The representation is the output of ``fc2`` after its ReLU, the input of ``fc3``.

    Args:
        input_shape: ``(C, H, W)``.
        channels2: channels of the second convolution; the first has 16.
        width1: width of ``fc1``.
        rep_dim: width of ``fc2``.
        num_classes: width of ``fc3``.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, channels2: int, width1: int, rep_dim: int, num_classes: int
    ) -> None:
        if len(input_shape) != 3:
            raise ModelError(
                f"the CNNs take images (C, H, W) of at least {_SMALLEST}x{_SMALLEST} pixels, got {input_shape}; choose "
                "another model, such as mlp"
            )
        if min(input_shape[1:]) < _SMALLEST:
            raise ModelError(
                f"the CNNs take images (C, H, W) of at least {_SMALLEST}x{_SMALLEST} pixels, got "
                f"{input_shape}: two unpadded 5x5 convolutions and two poolings leave nothing of a smaller "
                "image; set data.image_size, or choose another model"
            )
        super().__init__()
        channels, *sides = input_shape
        height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, channels2, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(channels2 * height * width, width1)
        self.fc2 = nn.Linear(width1, rep_dim)
        self.fc3 = nn.Linear(rep_dim, num_classes)
        self.stages = ["pool1", "pool2", "fc2"]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> logits ``(B, L)``."""
        x = self.pool1(torch.relu(self.conv1(x)))  # (B, 16, (H-4)/2, (W-4)/2)
        x = self.pool2(torch.relu(self.conv2(x)))  # (B, channels2, h, w)
        x = torch.relu(self.fc1(x.flatten(1)))  # (B, width1)
        x = torch.relu(self.fc2(x))  # (B, rep_dim)
        return self.fc3(x)  # (B, L)
