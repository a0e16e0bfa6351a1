"""Networks as users bring them: a frozen pretrained backbone, a GRU, a Conv1d, a transformer block, an embedding.

The first trains its head by FedAvg; the next three train together by FedProto, as clients with different networks. The
digits that come with polyfed stand for a series here: each row of an image is a point of it.

    python examples/own_networks.py [ROUNDS]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyfed import Config, simulate


class Backbone(nn.Module):
    """Two convolutions with BatchNorm: images (B, 1, H, W) -> features (B, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images -> features."""
        return self.layers(x).flatten(1)


class Pretrained(nn.Module):
    """A pretrained backbone that stays as it is, and a head that is trained. The backbone never travels."""

    def __init__(self, num_classes: int, weights: str) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.backbone.load_state_dict(load_file(weights))
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(32, num_classes)

    def train(self, mode: bool = True) -> "Pretrained":
        """Keep the backbone's BatchNorm in evaluation mode, so that its statistics stay as they are, too."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) -> logits (B, L)."""
        return self.head(self.backbone(x))


class Gru(nn.Module):
    """A recurrent network over a series."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(input_shape[-1], width, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """A series (B, ..., T, C) -> logits (B, L)."""
        hidden, _ = self.gru(x.reshape(x.shape[0], -1, x.shape[-1]))
        return self.head(hidden[:, -1])


class Convolutions(nn.Module):
    """Convolutions along a series."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.one = nn.Conv1d(input_shape[-1], width, 3, padding=1)
        self.two = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """A series (B, ..., T, C) -> logits (B, L)."""
        h = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)  # Conv1d wants (B, C, T)
        h = torch.relu(self.two(torch.relu(self.one(h))))
        return self.head(h.mean(2))


class Transformer(nn.Module):
    """A transformer block over a series, with a learned position for each point."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(input_shape[-1], width)
        self.positions = nn.Parameter(0.02 * torch.randn(input_shape[-2], width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """A series (B, ..., T, C) -> logits (B, L)."""
        h = self.embed(x.reshape(x.shape[0], -1, x.shape[-1])) + self.positions
        return self.head(self.block(h).mean(1))


class Tokens(nn.Module):
    """The mean of the embeddings of a text's tokens, without its padding."""

    def __init__(self, num_classes: int, vocabulary: int = 1000, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) of int64, 0 = padding -> logits (B, L)."""
        here = (x != 0).to(self.embed.weight.dtype).unsqueeze(2)  # the mask, found in the tokens
        return self.head((self.embed(x) * here).sum(1) / here.sum(1).clamp(min=1))  # no 0 / 0 in a row of padding


def run(rounds: int, algorithm: str, models: list[dict[str, str]]) -> None:
    """Train clients that have these networks in turn, and print what came of it."""
    config = Config.parse(
        {
            "run": {"name": "own-networks", "rounds": rounds, "eval_every": rounds, "threads": 1},
            "data": {"image_size": 16},
            "partition": {"kind": "dirichlet", "alpha": 1.0, "samples_per_client": 40},
            "clients": {"count": 6, "models": models},
            "train": {"batch_size": 16, "optimizer": "adam", "lr": 0.003},
            "algorithm": {"name": algorithm},
        }
    )
    result = simulate(config)
    print(f"{algorithm}: {result.costs['bytes_up']:,} bytes up; the run lies in {result.run_dir}")
    for model, accuracy in result.summary["accuracy"]["by_model"].items():
        print(f"  {model}: {accuracy:.3f}")


def main(rounds: int) -> None:
    """Train the networks."""
    weights = Path("backbone.safetensors")
    save_file(Backbone().state_dict(), weights)  # in earnest: weights from a training on other data
    run(rounds, "fedavg", [{"name": "own_networks:Pretrained", "weights": str(weights), "classifier": "head"}])
    series = ("Gru", "Convolutions", "Transformer")
    run(rounds, "fedproto", [{"name": f"own_networks:{name}", "classifier": "head"} for name in series])


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 5)
