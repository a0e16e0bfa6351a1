"""Your own image files: a folder for each client, with a folder for each class, and networks of two sizes.

The pictures below are made up: three clinics photograph round and square spots, each with a camera of its own
brightness and resolution. polyfed resizes them to one side (data.image_size), and no clinic sees another's pictures.

    python examples/own_images.py [ROUNDS]
"""

import random
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from polyfed import simulate

CLINICS = {"north": (20, 24), "south": (60, 32), "west": (100, 40)}  # brightness of the background, pixels a side


def draw_folder(root: Path, pictures: int = 40) -> None:
    """Draw ``pictures`` spots of each class for each clinic: ``<clinic>/round/0.png`` and so on."""
    draw = random.Random(0)
    for clinic, (grey, side) in CLINICS.items():
        for shape in ("round", "square"):
            folder = root / clinic / shape
            folder.mkdir(parents=True)
            for number in range(pictures):
                picture = Image.new("L", (side, side), grey + draw.randrange(20))
                width, pen = side // 2, ImageDraw.Draw(picture)
                left, top = (draw.randrange(side - width) for _ in range(2))
                spot = pen.ellipse if shape == "round" else pen.rectangle
                spot((left, top, left + width, top + width), fill=grey + 60 + draw.randrange(60))
                picture.save(folder / f"{number}.png")


def main(rounds: int) -> None:
    """Train together, then alone, on the same splits."""
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder) / "spots")
        tables = {
            "run": {"name": "own-images", "rounds": rounds, "eval_every": rounds, "threads": 1},
            "data": {"dataset": "images", "path": f"{folder}/spots", "image_size": 20},
            "partition": {"kind": "natural"},
            "clients": {"count": 3, "models": ["cnn5", "cnn4"]},
            "train": {"epochs": 5, "batch_size": 16, "optimizer": "adam", "lr": 0.001},
        }
        for algorithm in ("fedmrl", "standalone"):
            result = simulate(tables, algorithm=algorithm)
            print(f"{algorithm}: accuracy {result.accuracy:.3f}, in {result.run_dir}")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 6)
