"""Your own network beside networks of the catalogue: a plain nn.Module, cut by names, its forward untouched.

FedMRL on the digits that come with polyfed. Half of the clients train the ResidualNet below. polyfed needs to know one
thing about it: where its classifier begins.

    python examples/own_model.py [ROUNDS]
"""

import sys

import torch
from torch import Tensor, nn

from polyfed import Config, simulate


class ResidualNet(nn.Module):
    """A convolution, a residual branch, and a dense head. The representation is what `head` receives: 256 numbers."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], width, 3, stride=2, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(width * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, L)."""
        h = torch.relu(self.stem(x))
        h = h + self.branch(h)  # the residual joins before the cut, so one tensor passes it
        return self.head(self.pool(h).flatten(1))


def main(rounds: int) -> None:
    """Train, and print the accuracy of each architecture."""
    own = {"name": "own_model:ResidualNet", "width": 16, "classifier": "head"}
    config = Config.parse(
        {
            "run": {"name": "own-model", "rounds": rounds, "eval_every": rounds, "threads": 1},
            "data": {"image_size": 20},
            "partition": {"kind": "classes", "classes_per_client": 5, "samples_per_client": 43},
            "clients": {"count": 4, "models": [own, "cnn5"]},
            "train": {"epochs": 2, "batch_size": 32, "lr": 0.05, "momentum": 0.9},
            "algorithm": {"name": "fedmrl"},
        }
    )
    result = simulate(config)
    for model, accuracy in result.summary["accuracy"]["by_model"].items():
        print(f"{model}: {accuracy:.3f}")
    print(f"up {result.costs['bytes_up']:,} bytes; the run lies in {result.run_dir}")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 5)
