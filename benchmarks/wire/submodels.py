"""What FIARSE's message to a client takes: bytes beside the floor, and seconds to encode and to decode it.

    OMP_NUM_THREADS=1 python benchmarks/wire/submodels.py [--turns 7]

The network is the CIFAR ResNet-18. "equal" weights are of one law in all layers, so that all layers have the same
density, which is the most that positions can take; "initial" weights are the network's own. The floor is the values
and, for each tensor of n weights of which a share p is kept, n H(p) bits. Encoding is from weights and a mask to the
bytes of the message, decoding from these to weights at full size. MB/s are megabytes of dense weights by the processor
time of one core, the best of the turns, as others may use the machine; beside them a copy of the dense weights with
zeros in it, and zlib at its fastest level on that.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from polyfed.algorithms.fiarse import FIARSE
from polyfed.base.rng import Rng
from polyfed.blocks.submodel import Sparse, apply_mask, top_k_threshold
from polyfed.blocks.weightwise import masked_names
from polyfed.core.message import decode, encode, size
from polyfed.models.zoo import build

CAPACITIES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
#: What is asked: MB of dense weights per second, and the share above the floor at capacities 1/64 to 1/4.
FASTEST, ABOVE = 200, 0.01


def best(turns: int, *jobs: Callable[[], object]) -> list[float]:
    """Seconds of the processor of each job, the best of the turns that they take one after another."""
    found = [math.inf] * len(jobs)
    for _ in range(turns):
        for place, job in enumerate(jobs):
            start = time.process_time()
            job()
            found[place] = min(found[place], time.process_time() - start)
    return found


def floor(values: int, mask: dict[str, Tensor]) -> float:
    """Bytes of the values, and of the entropy of each tensor's mask."""
    shares = [(held.numel(), float(held.double().mean())) for held in mask.values()]
    return values - sum(n * p * math.log2(p) / 8 for n, kept in shares for p in (kept, 1 - kept) if p)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    model = build("resnet18", input_shape=(3, 32, 32), num_classes=10)
    initial, generator = model.init(Rng(())), torch.Generator().manual_seed(0)
    names = masked_names(model)
    equal = {n: torch.randn(v.shape, generator=generator) if n in names else v for n, v in initial.items()}
    print(
        "| weights | capacity | bytes | above the floor | header | encode, MB/s | decode, MB/s | copy | zlib | fits |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for law, params in {"equal": equal, "initial": initial}.items():
        weights = {name: params[name] for name in names}
        for capacity in CAPACITIES:
            theta = top_k_threshold(weights, capacity)
            mask = {name: value.abs() >= theta for name, value in weights.items()}
            dense = torch.cat([value.reshape(-1).float() for value in apply_mask(params, mask).values()])

            def written(params: dict[str, Tensor] = params, mask: dict[str, Tensor] = mask, t: float = theta) -> bytes:
                return encode(FIARSE.Broadcast(Sparse.take(params, mask), (t,)))

            data, raw = written(), dense.numpy().tobytes()

            def read(data: bytes = data) -> dict[str, Tensor]:
                message = decode(data, FIARSE.Broadcast)
                assert isinstance(message, FIARSE.Broadcast)
                return message.submodel.dense(model.shapes)

            told = size(FIARSE.Broadcast(Sparse.take(params, mask), (theta,)))
            seconds = best(turns, written, read, dense.clone) + best(1, lambda raw=raw: zlib.compress(raw, 1))
            speeds = [dense.nbytes / each / 1e6 for each in seconds]
            above = len(data) / floor(told.values, mask) - 1
            fits = above <= ABOVE and min(speeds[:2]) >= FASTEST
            print(
                f"| {law} | 1/{1 / capacity:.0f} | {len(data):,} | {above:.2%} | {told.header:,} | "
                + " | ".join(f"{speed:,.0f}" for speed in speeds)
                + f" | {'yes' if fits else 'no'} |",
                flush=True,
            )
    print(f"asked: at most {ABOVE:.0%} above the floor, at least {FASTEST} MB/s each way")


if __name__ == "__main__":
    main()
