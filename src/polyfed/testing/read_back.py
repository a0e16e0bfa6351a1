"""Reads an export back with the runtime that it is for, as a program that knows nothing of polyfed.

``python read_back.py FILE INPUTS.npz OUT.npz ...`` runs each model on the arrays of its inputs, and on the example of
the file. It imports neither polyfed nor what a model was made with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_back(
    cases: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[tuple[NDArray[Any], dict[str, Any]]]:
    """Return the output of each exported file on arrays by input name, and its description, from another process.

    Args:
        cases: of each a .pt2 or .onnx file, and its inputs.
        folder: for files in between.

    Raises:
        AssertionError: the example of a file does not give the output beside it.
    """
    words: list[str] = []
    outs: list[Path] = []
    for number, (file, inputs) in enumerate(cases):
        given, out = folder / f"in-{number}.npz", folder / f"out-{number}.npz"
        np.savez(given, **dict[str, Any](inputs))
        words += [str(file), str(given), str(out)]
        outs.append(out)
    subprocess.run([sys.executable, "-W", "ignore", "-I", __file__, *words], check=True, cwd=folder)
    found: list[tuple[NDArray[Any], dict[str, Any]]] = []
    for out in outs:
        with np.load(out) as arrays:
            about = json.loads(str(arrays["about"]))
            expected = np.array(about["example"]["output"], dtype=float)
            np.testing.assert_allclose(arrays["example"], expected, atol=1e-5, rtol=1e-6, err_msg=str(out))
            found.append((arrays["output"], about))
    return found


def _pt2(path: str) -> tuple[dict[str, Any], Callable[[Sequence[NDArray[Any]]], NDArray[Any]]]:
    import torch

    extra = {"polyfed.json": ""}
    model = torch.export.load(path, extra_files=extra).module()
    return json.loads(extra["polyfed.json"]), lambda arrays: model(*map(torch.from_numpy, arrays)).detach().numpy()


def _onnx(path: str) -> tuple[dict[str, Any], Callable[[Sequence[NDArray[Any]]], NDArray[Any]]]:
    # Any: it may not be installed where types are checked.
    runtime: Any = import_module("onnxruntime")
    session = runtime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["polyfed.json"])
    names = [given["name"] for given in about["inputs"]]
    assert [given.name for given in session.get_inputs()] == names
    return about, lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def _main(words: list[str]) -> None:
    for path, given, out in zip(words[::3], words[1::3], words[2::3], strict=True):
        with np.load(given) as inputs:
            about, run = (_pt2 if path.endswith(".pt2") else _onnx)(path)
            example = [
                np.array(about["example"]["inputs"][each["name"]], dtype=float).astype(each["type"])
                for each in about["inputs"]
            ]
            output = run([inputs[each["name"]] for each in about["inputs"]])
            np.savez(out, output=output, example=run(example), about=json.dumps(about))
    assert "polyfed" not in sys.modules


if __name__ == "__main__":
    _main(sys.argv[1:])
