"""Whether two source trees give the same numbers: one short run of every algorithm by each, compared bit by bit.

    git worktree add ../before COMMIT
    python benchmarks/numbers/same.py ../before/src src [--only fedmrl,fiarse] [--ulps 0]

Both trees run in this environment, one after the other, on one thread and with the sequential driver. The script
compares all tensors of the server's and the clients' states, the bytes sent, the FLOPs and the accuracies. With
``--ulps N`` a tensor may differ by N units in the last place of its type; the script prints every difference either
way. The exit code is 1 if a difference is larger. The script keeps no numbers, because they depend on the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

#: Networks, the most unlike first; an algorithm gets the first that it accepts.
FAMILIES = (
    ["mlp(hidden=(24, 21))", "resnet8(width=5)"],
    ["mlp(hidden=(24, 20))", "resnet8(width=5)"],
    ["in-resnet10-small(width=5)", "in-resnet14-small(width=5)"],
    ["resnet8(width=5)"],
)
#: Keys without which an algorithm would do nothing in one round, or would be slow.
KEYS = {
    "fedmrl": {"rep_dim": 9},
    "fedmrl-adaptive": {"rep_dim": 9},
    "fedmrl-e": {"rep_dim": 9, "granularities": [5, 9]},
    "fedmrl-ssl": {"rep_dim": 9, "head_dim": 7, "auxiliary": "mlp(hidden=(24, 21))"},
}
KEYS |= {"fedl2g": {"warmup": 1}, "fedin": {"feature_batch": 8}}
#: Rounds, where the first one is only a warm-up.
ROUNDS = {"fedl2g": 2, "fedin": 2, "inclusivefl": 2, "moon": 2, "scaffold": 2}


def tensors(run_dir: Path) -> dict[str, list[object]]:
    """Every tensor of the checkpoint in a run directory: type, shape and bytes in hexadecimal."""
    import safetensors.torch
    import torch

    blobs: dict[str, bytes] = {"server": next(run_dir.glob("checkpoint/server-round-*.safetensors")).read_bytes()}
    index = run_dir / "states" / "index.sqlite"
    if index.exists():
        with sqlite3.connect(index) as db:
            for client, data in db.execute("SELECT client, data FROM states ORDER BY client, round"):
                if data is not None:
                    blobs[f"client {client}"] = data
        for path in run_dir.glob("states/*/client-*.safetensors"):
            blobs[f"client {path.name.split('-')[1]}"] = path.read_bytes()
    out: dict[str, list[object]] = {}
    for owner, data in blobs.items():
        for name, value in sorted(safetensors.torch.load(data).items(), key=lambda item: int(item[0])):
            flat = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
            raw = flat.numpy().tobytes().hex()
            out[f"{owner}, tensor {name}"] = [str(value.dtype), list(value.shape), raw]
    return out


def child(only: list[str]) -> None:
    """Run every algorithm of the tree on PYTHONPATH; prints one line of JSON for each."""
    import torch

    import polyfed
    from polyfed import Config, PolyfedError, simulate
    from polyfed.algorithms.catalogue import ALGORITHMS

    here = Path(polyfed.__file__).parents[1]
    if here != Path(os.environ["PYTHONPATH"]):
        raise SystemExit(f"polyfed comes from {here}, expected {os.environ['PYTHONPATH']}")
    torch.set_num_threads(1)
    for name in only or ALGORITHMS:
        for capacities in ([1.0, 0.3], [1.0]):
            for models in FAMILIES:
                tables = {
                    "run": {"seed": 3, "rounds": ROUNDS.get(name, 1), "driver": "sequential", "threads": 1},
                    "partition": {"kind": "dirichlet", "alpha": 2.0, "samples_per_client": 40},
                    "clients": {"count": 5, "models": models, "capacities": capacities},
                    "train": {"epochs": 1, "batch_size": 10, "lr": 0.01, "momentum": 0.5, "weight_decay": 1e-3},
                    "algorithm": {"name": name, **KEYS.get(name, {})},
                }
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        with redirect_stdout(sys.stderr):  # standard output takes the facts, not the progress
                            simulate(Config.parse(tables), out=Path(folder) / "run")
                    except PolyfedError as error:
                        refusal = str(error)
                        continue
                    found = json.loads((Path(folder) / "run" / "summary.json").read_text())
                    facts = {"accuracy": found["accuracy"]["mean"], "flops": found["flops"]}
                    facts |= {way: found["bytes"][way] for way in ("up", "down")}
                    print(json.dumps({"name": name, "facts": facts, "tensors": tensors(Path(folder) / "run")}))
                break
            else:
                continue
            break
        else:
            print(json.dumps({"name": name, "refused": refusal}))


def results(tree: Path, only: list[str]) -> dict[str, dict]:
    """What the children of one tree print, by algorithm."""
    if not (tree / "polyfed" / "__init__.py").exists():
        raise SystemExit(f"{tree} holds no package polyfed; give the folder src of a checkout")
    env = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", *([",".join(only)] if only else [""])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}


def ulps(a: list, b: list) -> float:
    """The largest difference of two tensors in units of the last place of the larger number; infinite for others."""
    import torch

    if a[:2] != b[:2]:
        return float("inf")
    dtype = getattr(torch, a[0].removeprefix("torch."))
    left, right = (torch.frombuffer(bytearray.fromhex(raw), dtype=dtype) for raw in (a[2], b[2]))
    if not dtype.is_floating_point:
        return 0.0 if torch.equal(left, right) else float("inf")
    unit = torch.maximum(left.abs(), right.abs()).double() * torch.finfo(dtype).eps
    difference = (left.double() - right.double()).abs()
    return float((difference / unit.clamp_min(1e-45)).max())


def main() -> int:
    """Compare two trees; prints a line for each algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="two folders that hold the package polyfed")
    parser.add_argument("--only", default="", help="algorithms, separated by commas")
    parser.add_argument("--ulps", type=float, default=0.0, help="units in the last place that a tensor may differ by")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child([name for name in options.child.split(",") if name])
        return 0
    if len(options.trees) != 2:
        parser.error("give two folders: before and after")
    before, after = (results(tree, [n for n in options.only.split(",") if n]) for tree in options.trees)
    worst = 0
    for name in sorted({*before, *after}):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            print(f"{name}: only {'after' if a is None else 'before'}")
            continue
        if "refused" in a or "refused" in b:
            worst = 1
            print(f"{name}: not run: {a.get('refused')} / {b.get('refused')}")
            continue
        differ = [
            key for key in sorted({*a["tensors"], *b["tensors"]}) if a["tensors"].get(key) != b["tensors"].get(key)
        ]
        facts = {key: (a["facts"][key], b["facts"][key]) for key in a["facts"] if a["facts"][key] != b["facts"][key]}
        missing = [key for key in differ if key not in a["tensors"] or key not in b["tensors"]]
        units = [ulps(a["tensors"][key], b["tensors"][key]) for key in differ if key not in missing]
        most = float("inf") if missing else max(units, default=0.0)
        counts = f"{len(a['tensors'])} tensors"
        if not differ and not facts:
            print(f"{name}: the same, {counts}")
            continue
        print(f"{name}: {len(differ)} of {counts} differ, by at most {most:.3g} units in the last place; {facts or ''}")
        worst |= most > options.ulps or bool(set(facts) - {"accuracy"}) or (bool(facts) and not options.ulps)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
