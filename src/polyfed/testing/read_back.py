"""Reads an export back with the runtime that it is for, as a program that knows nothing of polyfed.

``python read_back.py`` reads a line of JSON at a time, ``[FILE, INPUTS.npz, OUT.npz, ...]``, runs each model on the
arrays of its inputs and on the example of the file, and answers ``done``. It imports neither polyfed nor what a model
was made with. One process serves all calls, as starting it takes longer than the models do.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
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
        RuntimeError: a file cannot be read; the process has printed why.
    """
    words: list[str] = []
    outs: list[Path] = []
    for number, (file, inputs) in enumerate(cases):
        given, out = folder / f"in-{number}.npz", folder / f"out-{number}.npz"
        np.savez(given, **dict[str, Any](inputs))
        words += [str(each.absolute()) for each in (file, given, out)]
        outs.append(out)
    _ask(words)
    found: list[tuple[NDArray[Any], dict[str, Any]]] = []
    for out in outs:
        with np.load(out) as arrays:
            about = json.loads(str(arrays["about"]))
            expected = np.array(about["example"]["output"], dtype=float)
            np.testing.assert_allclose(arrays["example"], expected, atol=1e-5, rtol=1e-6, err_msg=str(out))
            found.append((arrays["output"], about))
    return found


def _ask(words: Sequence[str]) -> None:
    reader = _reader()
    assert reader.stdin is not None
    assert reader.stdout is not None
    print(json.dumps(words), file=reader.stdin, flush=True)
    for line in reader.stdout:  # a library may print, too
        if line.strip() == _DONE:
            return
        if line.strip() == _FAILED:
            break
    else:
        _reader.cache_clear()
    raise RuntimeError(f"one of {', '.join(words[::3])} cannot be read back")


_DONE, _FAILED = "done", "failed"


@cache
def _reader() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-I", __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end() -> None:
        process.kill()
        process.communicate()

    atexit.register(end)
    return process


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
    for each in sys.stdin:
        try:
            _main(json.loads(each))
            print(_DONE, flush=True)
        except Exception:
            traceback.print_exc()
            print(_FAILED, flush=True)
