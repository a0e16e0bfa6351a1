"""A GPU that is not there: `python tests/helpers/pretend.py [ALGORITHM ...]` finds tensors that stay on the CPU.

Tensors on it are torch's fake ones, of shape and device alone; an operation on two devices is an error, as on a GPU.
Each function that an algorithm trains or sums by takes a step there, alone and stacked, and each model predicts there,
beside a run on the CPU that decides what they are given. Prints a line for each algorithm: its name and what was tried.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from small import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.base.errors import ModelError
from polyfed.base.types import Parts
from polyfed.core.net import Nets
from polyfed.core.plan import Step
from polyfed.core.requests import Fit, drive
from polyfed.execute import local_training
from polyfed.execute.drivers import Sequential
from polyfed.execute.local_training import Local, bind, run_reduce, tree_to
from polyfed.execute.placement import Placement
from polyfed.execute.stacked import Stack, why_not
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store

#: Networks, the most unlike first; an algorithm gets the first that it accepts.
FAMILIES = (
    ["mlp(hidden=(24, 21))", "resnet8(width=5)"],
    ["mlp(hidden=(24, 20))", "resnet8(width=5)"],
    ["in-resnet10-small(width=5)", "in-resnet14-small(width=5)"],
    ["resnet8(width=5)"],
)
KEYS: dict[str, dict[str, Any]] = {
    "fedmrl": {"rep_dim": 9},
    "fedmrl-adaptive": {"rep_dim": 9},
    "fedmrl-e": {"rep_dim": 9, "granularities": [5, 9]},
    "fedmrl-ssl": {"rep_dim": 9, "head_dim": 7, "auxiliary": "mlp(hidden=(24, 21))"},
    "fedl2g": {"warmup": 1},
    "fedin": {"feature_batch": 8},
}


class Pretended(Placement):
    """The device. It has no autocast, which is off in fp32 anyway."""

    def autocast(self) -> Any:
        """Nothing."""
        return nullcontext()


class Mode(FakeTensorMode):
    """Of a device that must never be asked for memory."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType]


def pretending() -> AbstractContextManager[Any]:
    """Inside the block no tensor holds numbers."""
    return Mode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


class Plain(torch.optim.SGD):
    """Torch's, without its fused kernel, which this device lacks."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **{**keys, "fused": False, "foreach": False})


class Watching(Sequential):
    """Does the work on the CPU, and each kind of it once on the device that is not there."""

    def __init__(self, there: Placement) -> None:
        super().__init__(Placement.of("cpu", "fp32"))
        self.there = there
        self.tried: dict[str, int] = {}
        self._known: set[object] = set()

    def _new(self, request: Any, function: Any) -> bool:
        kind = (type(request).__name__, getattr(function, "__name__", "step"))
        new = kind not in self._known
        self._known.add(kind)
        self.tried[kind[0]] = self.tried.get(kind[0], 0) + new
        return new

    def _perform(self, request: Any, account: Any) -> Any:
        if isinstance(request, Fit):
            if self._new(request, request.loss or request.gradient):
                self._fit_at(request, self.placement)  # slices are made once, and kept
                with pretending():
                    self._fit_at(request, self.there)
        elif self._new(request, request.fn):
            # Sums that were looked at for NaN would be finished; that there are none to look at ends it here.
            with pretending(), suppress(GuardOnDataDependentSymNode):
                run_reduce(request, self.there)
        return super()._perform(request, account)

    def _fit_at(self, fit: Fit, placement: Placement) -> None:
        for model in fit.client.models.values():
            model.train(True)
        rows, draws = torch.arange(min(10, len(fit.client.train))), torch.Generator().manual_seed(0)
        drawn = fit.drawn(Step(rows, 0, 0))
        resident = near(fit.client.train, placement.device)
        for due in (False, True) if fit.every != "never" else (False,):
            Local(fit, placement).step(placement.batch(resident, rows, draws), due, drawn)
            if why_not(fit) is None and placement is self.there:
                stack = Stack([fit] * 3, placement)
                for who in ([0, 1, 2], [0, 2]):
                    data, each = [fit.client.train] * len(who), [rows] * len(who)
                    seen = {name: torch.stack([placement.put(value)] * len(who)) for name, value in drawn.items()}
                    stack.step(who, placement.batches(data, each, [draws] * len(who)), due, seen)


def near(data: Any, device: torch.device) -> Any:
    """A client's examples where the data set lies on the device."""
    dataset = copy.copy(data.dataset)
    for name in ("x", "y"):
        object.__setattr__(dataset, name, getattr(dataset, name).to(device))
    dataset.__dict__.pop("channels", None)
    data = copy.copy(data)
    data.dataset = dataset
    return data


def predict(federation: Federation, clients: LocalClients, server: Any, there: Placement, algorithm: Any) -> None:
    """A client's models and the server's, on examples that lie there."""
    message = algorithm.message_for(server, federation.info(0))
    local = federation.local(0, 1)
    steps = algorithm.predictor_parts(clients.private(0), message, local)
    parts: Parts = drive(steps, clients.driver.perform)
    named: list[Nets] = [bind(local.models, parts), *algorithm.global_nets(server, federation.task).values()]
    test = federation.data.test(0)
    with pretending():
        data = near(test, there.device)
        for nets in named:
            held = tree_to({part: net.params for part, net in nets.items()}, there)
            here = bind({part: net.model for part, net in nets.items() if net.model is not None}, held)
            x, y = there.batch(data, torch.arange(3))
            for logits in algorithm.predict(here, x).values():
                assert (logits.argmax(dim=1) == y).device.type == there.device.type


def federation(name: str) -> Federation:
    """A small one that the algorithm accepts."""
    for capacities in ([1.0, 0.3], [1.0]):
        for models in FAMILIES:
            clients = {"count": 4, "models": models, "capacities": capacities}
            with suppress(ModelError):
                return prepare(config(clients=clients, algorithm={"name": name, **KEYS.get(name, {})}).resolved())
    raise SystemExit(f"{name} accepts none of the networks")


def main(names: Sequence[str]) -> None:
    """Try them."""
    _setup_privateuseone_for_python_backend("pretended")
    local_training.torch.optim.SGD = Plain  # pyright: ignore[reportAttributeAccessIssue]
    there = Pretended(torch.device("pretended", 0))
    for name in names or ALGORITHMS:
        played = federation(name)
        _ = played.dataset.channels  # made before anything is pretended
        driver = Watching(there)
        clients = LocalClients(played, driver, Store(Path("never-written"), played.algorithm.states, resident=True))
        server: Any = played.algorithm.init_server(played.task, played.rng.at("server"))
        for round_ in range(1, 1 + (2 if name in ("fedl2g", "fedin", "moon", "scaffold") else 1)):
            server = play_round(played, server, draw_cohort(played, round_), clients, driver).server
            clients.commit()
        predict(played, clients, server, there, played.algorithm)
        print(name, driver.tried, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
