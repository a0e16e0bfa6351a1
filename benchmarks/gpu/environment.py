"""What the tables of this folder were measured on: `python environment.py OUT DEVICE` writes environment.json."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pydantic", "safetensors", "typer", "rich", "pytest", "hypothesis")


def said(*command: str) -> str | None:
    """What a command prints; None where there is none, or where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sources() -> str:
    """A digest of the package's sources, as a copy of the tree may have no history."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def main(out: Path, device: str) -> int:
    """Write the facts; 1 where a GPU is wanted and torch sees none."""
    gpu = torch.cuda.is_available()
    facts = {
        "device": device,
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        **{name: installed(name) for name in PACKAGES},
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
        "sources": sources(),
    }
    text = json.dumps(facts, indent=2)
    (out / "environment.json").write_text(text + "\n")
    print(text)
    return int(device != "cpu" and not gpu)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
