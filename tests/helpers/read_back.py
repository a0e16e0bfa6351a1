"""Reads an export back with the runtime that it is for, as a program that knows nothing of polyfed.

``python read_back.py FILE INPUTS.npz OUT.npz`` runs the model on the arrays of INPUTS in the order of the description,
and writes its output and, as ``example``, that on the example of the file. With several of each, it does them in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_back(
    cases: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[tuple[np.ndarray[Any, Any], dict[str, Any]]]:
    """The output of each exported file on arrays by input name, and its description, from another process."""
    words: list[str] = []
    outs: list[Path] = []
    for number, (file, inputs) in enumerate(cases):
        given, out = folder / f"in-{number}.npz", folder / f"out-{number}.npz"
        np.savez(given, **{name: np.asarray(value) for name, value in inputs.items()})
        words += [str(file), str(given), str(out)]
        outs.append(out)
    subprocess.run([sys.executable, "-W", "ignore", "-I", __file__, *words], check=True, cwd=folder)
    found: list[tuple[np.ndarray[Any, Any], dict[str, Any]]] = []
    for out in outs:
        with np.load(out) as arrays:
            about = json.loads(str(arrays["about"]))
            expected = np.array(about["example"]["output"], dtype=float)
            np.testing.assert_allclose(arrays["example"], expected, atol=1e-5, rtol=1e-6, err_msg=str(out))
            found.append((arrays["output"], about))
    return found


def _pt2(path: str, inputs: Any) -> tuple[Any, Any]:
    import torch

    extra = {"polyfed.json": ""}
    model = torch.export.load(path, extra_files=extra).module()
    return json.loads(extra["polyfed.json"]), lambda arrays: model(*map(torch.from_numpy, arrays)).detach().numpy()


def _onnx(path: str, inputs: Any) -> tuple[Any, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["polyfed.json"])
    names = [given["name"] for given in about["inputs"]]
    assert [given.name for given in session.get_inputs()] == names
    return about, lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def _main(words: list[str]) -> None:
    for path, given, out in zip(words[::3], words[1::3], words[2::3], strict=True):
        with np.load(given) as inputs:
            about, run = (_pt2 if path.endswith(".pt2") else _onnx)(path, inputs)
            example = [
                np.array(about["example"]["inputs"][each["name"]], dtype=float).astype(each["type"])
                for each in about["inputs"]
            ]
            output = run([inputs[each["name"]] for each in about["inputs"]])
            np.savez(out, output=output, example=run(example), about=json.dumps(about))
    assert "polyfed" not in sys.modules


if __name__ == "__main__":
    _main(sys.argv[1:])
