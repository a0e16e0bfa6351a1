"""Several algorithms on the same splits, over seeds, in one table with a paired test.

`share = false` turns FedMRL into its local-only control: the same three modules, nothing sent. FedMRL minus the control
is what sharing is worth; FedMRL minus Standalone is what the whole algorithm is worth.

    python examples/compare_algorithms.py [ROUNDS [SEEDS]]
"""

import sys

from polyfed import FedMRL, Standalone, compare


def main(rounds: int, seeds: int) -> None:
    """Compare, and print the table."""
    config = {
        "run": {"name": "example", "rounds": rounds, "eval_every": rounds, "threads": 1},
        "data": {"image_size": 20},
        "partition": {"kind": "classes", "classes_per_client": 5, "samples_per_client": 43},
        "clients": {"count": 4},
        "train": {"epochs": 1, "batch_size": 32, "lr": 0.05, "momentum": 0.9},
    }
    algorithms = [FedMRL(), FedMRL(share=False), Standalone()]
    print(compare(config, algorithms, list(range(seeds)), models=["cnn4", "cnn5"]))


if __name__ == "__main__":
    main(
        rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 3,
        seeds=int(sys.argv[2]) if len(sys.argv) > 2 else 3,
    )
