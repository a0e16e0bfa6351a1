"""The catalogue of data sets."""

from __future__ import annotations

import subprocess
import sys


def test_catalogue_needs_no_torch() -> None:
    program = (
        "import sys; from polyfed.data.catalogue import DATASETS, PARTITIONS; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(len(DATASETS))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "19", done.stderr
