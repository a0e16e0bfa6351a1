"""Files of weights that a client's network starts with: safetensors, compared with the network name by name."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.models.split import SplitModel


def load_weights(path: Path, model: SplitModel) -> dict[str, Tensor]:
    """Return the weights and buffers of a network from a file.

    Floating-point tensors take the type that new tensors have; half precision is widened.

    Args:
        path: a safetensors file with the names that the network's ``state_dict()`` has. Frozen parameters, which the
            network makes itself, may be left out. Where the network says so (`SplitModel.leniency`), tensors that are
            missing get the values of a fixed draw, and others are passed over.
        model: the network.

    Raises:
        ModelError: the file cannot be read, or differs from the network; the text has every difference.
    """
    (may_lack, passed_over), like = model.leniency, model.init(Rng(("polyfed.models", "weights")))
    found = {name: value for name, value in _read(path).items() if not name.startswith(passed_over)}
    found |= {name: value for name, value in like.items() if name not in found and name.startswith(may_lack)}
    faults = [
        *(f"{name}: missing" for name in like if name not in found),
        *(fault for name, value in found.items() if (fault := _difference(model, like.get(name), name, value))),
    ]
    if faults:
        raise ModelError(
            f"{path} does not hold the weights of model {model.name!r}: {'; '.join(faults)}. Save them from the same "
            "network, by safetensors.torch.save_file(network.state_dict(), path)"
        )
    dtype = torch.get_default_dtype()
    weights = {name: found[name] for name in like}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}


def weights_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file of weights.

    Raises:
        ModelError: the file cannot be read.
    """
    return sha256(_bytes(path)).hexdigest()


def _difference(model: SplitModel, like: Tensor | None, name: str, value: Tensor) -> str | None:
    constant = model.constants.get(name)
    if constant is not None:
        same = constant.shape == value.shape and torch.equal(constant, value.to(constant.dtype))
        return None if same else f"{name}: other values than the network's own, which are frozen (requires_grad False)"
    if like is None:
        return f"{name}: not in the network"
    if value.shape != like.shape:
        return f"{name}: shape {tuple(value.shape)}, expected {tuple(like.shape)}"
    if value.is_floating_point() != like.is_floating_point():
        return f"{name}: {value.dtype}, expected {'floating-point' if like.is_floating_point() else 'whole'} numbers"
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return f"{name}: NaN or infinity"
    return None


def _read(path: Path) -> Params:
    try:
        return load(_bytes(path))
    except SafetensorError as error:
        raise ModelError(
            f"{path} is no safetensors file ({error}); save weights by "
            "safetensors.torch.save_file(network.state_dict(), path). Files of torch.save are not read, as they can "
            "run code"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"the file of weights {path} cannot be read: {error.strerror or error}") from error
