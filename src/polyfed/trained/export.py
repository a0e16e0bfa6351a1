"""A trained model as one self-contained file: pt2 of ``torch.export``, ONNX, or safetensors with a description."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from polyfed.base import files
from polyfed.base.errors import ConfigError, ModelError
from polyfed.trained.model import TrainedModel

Format: TypeAlias = Literal["pt2", "onnx", "safetensors"]

#: The name of a file's description, which is JSON: in pt2 of an extra file, in ONNX of a property, in safetensors of an
#: entry of the metadata.
KEY = "polyfed.json"


def description(model: TrainedModel) -> dict[str, Any]:
    """Return what a person or a program needs to use an exported model, as JSON values.

    Returns:
        ``inputs`` (name, type, shape, columns, names of codes), ``output``, ``classes``, ``predictor``, whose model it
        is, the networks by part, and an ``example``: made-up inputs and their output, null where a number is missing.
    """
    example = model.example()
    with torch.no_grad():
        output = model(*example)
    return {
        **model.about,
        "predictor": model.predictor,
        "task": "classification" if model.classes else "regression",
        "classes": list(model.classes),
        "inputs": [given.described() for given in model.inputs],
        "output": {"name": output_name(model), "type": "float64", "shape": ["batch", output.shape[1]]},
        "networks": {
            part: {
                "model": network.name,
                "input_shape": list(network.input_shape),
                "layers": network.described,
            }
            for part, network in model.networks.items()
        },
        "example": {
            "inputs": {given.name: _listed(value) for given, value in zip(model.inputs, example, strict=True)},
            "output": _listed(output),
        },
    }


def _distances(a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    """Euclidean distances (..., n, m) of a, (..., n, d), and b, (..., m, d)."""
    if p != 2.0:
        raise ModelError(f"torch.cdist with p = {p} has no form in ONNX")
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt()


#: Operations that the ONNX exporter does not know -> the same in operations that it knows.
_WITHOUT_FORM: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cdist.default: _distances,
    torch.ops.aten._cdist_forward.default: _distances,
}


def output_name(model: TrainedModel) -> str:
    """Return the name of the output: "probabilities" or "predictions"."""
    return "probabilities" if model.classes else "predictions"


def export(model: TrainedModel, out: Path, form: Format) -> None:
    """Write a trained model to a single file, which needs neither polyfed nor its data; any batch size fits.

    Args:
        model: the model, on the CPU.
        out: the file; an existing file is replaced.
        form: "pt2": ``torch.export.load(out).module()``, needs torch alone; "onnx": for onnxruntime and others, needs
            the packages onnx and onnxscript to be written; "safetensors": weights by name and their description, for
            people who build the network themselves.

    Raises:
        ModelError: the network cannot be exported; the text has the exporter's reason.
        ConfigError: a package is missing, or an unknown form.
        StorageError: the disk is full, or the folder not writable.
    """
    writers: Mapping[str, Callable[[TrainedModel], bytes]] = {
        "pt2": _pt2,
        "onnx": _onnx,
        "safetensors": _safetensors,
    }
    if form not in writers:
        raise ConfigError(f"format: got {form!r}; expected one of {', '.join(writers)}")
    files.write(out, writers[form](model))


def _text(model: TrainedModel) -> str:
    return json.dumps(description(model))


def _safetensors(model: TrainedModel) -> bytes:
    tensors = {name: value.detach().contiguous().clone() for name, value in model.named_tensors().items()}
    return safetensors.torch.save(tensors, metadata={KEY: _text(model)})


def _pt2(model: TrainedModel) -> bytes:
    text = _text(model)
    with _reasons(model, "pt2"):
        file = io.BytesIO()
        torch.export.save(_exported(model), file, extra_files={KEY: text})
    return file.getvalue()


def _exported(model: TrainedModel) -> torch.export.ExportedProgram:
    return torch.export.export(model, model.example(), dynamic_shapes=_dynamic(model), strict=False)


def _dynamic(model: TrainedModel) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return {"inputs": tuple({0: batch} for _ in model.inputs)}


def _onnx(model: TrainedModel) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"format: onnx needs the package {package} ({error}); run: pip install 'polyfed[export]', or choose pt2"
            ) from error
    text = _text(model)
    with _reasons(model, "onnx"), redirect_stdout(io.StringIO()):
        # Any: the exporter's program has no types.
        program: Any = torch.onnx.export(
            _exported(model).run_decompositions(_WITHOUT_FORM),
            input_names=[given.name for given in model.inputs],
            output_names=[output_name(model)],
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props[KEY] = text
        return program.model_proto.SerializeToString()


@contextmanager
def _reasons(model: TrainedModel, form: str) -> Generator[None]:
    """Turn whatever an exporter raises into a ModelError with its reason in a line."""
    log = logging.getLogger("torch")
    level = log.level
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what exporters say of themselves, and of packages that are not there
            log.setLevel(logging.ERROR)
            yield
    except Exception as error:  # exporters and a user's forward may raise anything
        names = ", ".join(network.name for network in model.networks.values())
        raise ModelError(
            f"{names} cannot be exported as {form}: {_reason(error)}; a forward must not branch on its data, and "
            f"{'every operation needs a form in ONNX: try pt2' if form == 'onnx' else 'safetensors always works'}"
        ) from error
    finally:
        log.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause in a line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:300]}"


def _listed(value: Tensor) -> Any:
    """A tensor as nested lists, None for NaN."""

    def nulled(item: Any) -> Any:
        if isinstance(item, list):
            return [nulled(one) for one in item]
        return None if isinstance(item, float) and math.isnan(item) else item

    return nulled(value.tolist())
