"""Forward passes that test a user's network before it trains: state in the wrong place, and what torch would say later.

One module serves all clients, so all that differs between clients has to be in its parameters and buffers. State in
any other place would leak from client to client. Two tests detect it: plain attributes are compared before and after
forward passes, and the output for one input is compared before and after another input.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.binding import Binding, frozen_norms, listed, places
from polyfed.models.state import attributes, contents, holder, leaves, named

_TORCH = str(Path(torch.__file__).parent)
_OLD_HOOKS = {
    "torch.nn.utils.weight_norm": "torch.nn.utils.parametrizations.weight_norm",
    "torch.nn.utils.spectral_norm": "torch.nn.utils.parametrizations.spectral_norm",
    "torch.nn.utils.prune": "torch.nn.utils.prune.remove, or a parametrization",
}

#: What a parameter or buffer may not be, and the sentence about it, after the name of the model.
_UNFIT: tuple[tuple[Callable[[Tensor], object], str], ...] = (
    (
        is_lazy,
        ": its lazy layer still has no shape for {name!r} after a forward pass; does the forward call the layer? "
        "Otherwise use a layer that is not lazy",
    ),
    (
        lambda tensor: tensor.layout != torch.strided,
        ": {name!r} is sparse, which polyfed cannot send or average; keep the positions and the values as two tensors, "
        "and make the sparse tensor of them in the forward",
    ),
    (
        lambda tensor: tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None),
        ": a hook on {name!r} would be lost, as polyfed puts the weights of each client in its place; change gradients "
        "in the forward, by a torch.autograd.Function, or set train.clip",
    ),
    (
        torch.is_complex,
        ": {name!r} is {kind}, but polyfed trains, sends and averages real numbers; store torch.view_as_real(tensor), "
        "and use torch.view_as_complex in the forward",
    ),
    (
        lambda tensor: tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor),
        ": {name!r} holds NaN or infinity when it is new; initialise it, by torch.nn.init for example (torch.empty "
        "leaves numbers as memory has them)",
    ),
)


def _finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity; `torch.isfinite` would take 1.7 times its memory."""
    return not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def fault(error: BaseException) -> str:
    """Return the error as text, with the class, the file and the line of the network's code that raised it."""
    found = _frame(error, own=True)
    if found is None:
        return f"{type(error).__name__}: {error}"
    frame, line = found
    where = f"{type(frame.f_locals['self']).__name__}, {Path(frame.f_code.co_filename).name}, line {line}"
    return f"{type(error).__name__}: {error} ({where})"


def failed(model: str, x: Tensor, error: BaseException, training: bool = False) -> str:
    """Return the text about a network whose forward fails on an input that tests it."""
    return (
        f"model {model!r} fails on an input of shape {tuple(x.shape)} and type {_dtype(x)}"
        f"{', in training mode' if training else ''}: {fault(error)}; does it accept samples of shape "
        f"{tuple(x.shape[1:])}?"
    )


def in_network(error: BaseException) -> bool:
    """Return whether a network's forward raised the error."""
    return _frame(error, own=False) is not None


def _frame(error: BaseException, *, own: bool) -> tuple[FrameType, int] | None:
    """Return the innermost frame, and its line, of a module's method; ``own``: of a module that is not torch's."""
    found, trace = None, error.__traceback__
    while trace is not None:
        of = trace.tb_frame.f_locals.get("self")
        if isinstance(of, nn.Module) and not (own and trace.tb_frame.f_code.co_filename.startswith(_TORCH)):
            found = trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
    return found


def complete(module: nn.Module, x: Tensor) -> None:
    """Give lazy layers their weights, by a forward pass in evaluation mode; torch's generator draws them."""
    if any(is_lazy(place.tensor) for place in places(module)):
        module.eval()
        with torch.no_grad():
            module(x)
        module.train()


def check_module(module: nn.Module, model: str, device: str = "cpu") -> None:
    """Raise unless the module's kinds of layers and tensors, on this device, can be trained on weights from outside.

    Raises:
        ModelError: the text names the layer or tensor, and the mend.
    """
    for path, child in named(module):
        name = type(child).__name__
        what = f"model {model!r}: " + (f"its submodule {path!r}" if path else "it")
        compiled = hasattr(child.forward, "_torchdynamo_orig_callable") or "_compiled_call_impl" in vars(child)
        if compiled or isinstance(child, torch.jit.ScriptModule) or hasattr(child, "_orig_mod"):
            raise ModelError(
                f"{what} is compiled ({name}); return the plain nn.Module, without script, trace and compile"
            )
        if isinstance(child, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ModelError(f"{what} is a {name}; return the network inside it: polyfed places networks itself")
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None:
            raise ModelError(
                f"{what} is an {name} with max_norm, which writes into its weight in a forward, in evaluation too; "
                "leave max_norm out, or normalise the result of the layer"
            )
        for hook in vars(child)["_forward_pre_hooks"].values():  # the only place of torch's older normalisations
            old = next((old for old in _OLD_HOOKS if type(hook).__module__.startswith(old)), None)
            if old:
                raise ModelError(
                    f"{what} ({name}) is changed by {old}, which keeps a weight in a plain attribute; use "
                    f"{_OLD_HOOKS[old]}"
                )
    for _, _, name, _, tensor in places(module):
        if tensor.device.type != device:
            raise ModelError(
                f"model {model!r} puts {name!r} on the device '{tensor.device}'; leave out device=, .to() and .cuda(): "
                "polyfed places networks itself, by run.device"
            )
        for unfit, text in _UNFIT:
            if unfit(tensor):
                raise ModelError(f"model {model!r}" + text.format(name=name, kind=_dtype(tensor)))
    _check_registered(module, model)


def check_input(module: nn.Module, model: str) -> list[str]:
    """Raise unless a forward with one input is possible; return a note on optional inputs, which are never fed.

    Raises:
        ModelError: the forward takes no input by its position, or needs more than one.
    """
    kinds = inspect.Parameter
    everything = inspect.signature(module.forward).parameters.values()
    takes = [parameter for parameter in everything if parameter.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if all(parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD) for parameter in everything):
        raise ModelError(f"model {model!r}: {type(module).__name__}.forward takes no input; expected forward(self, x)")
    needed = [parameter.name for parameter in takes if parameter.default is kinds.empty]
    where = f"{type(module).__name__}.forward({', '.join(parameter.name for parameter in takes)})"
    if len(needed) > 1 or (needed and takes[0].name != needed[0]):
        mask = "; the mask of padded tokens is x != 0" if any("mask" in name for name in needed) else ""
        raise ModelError(
            f"model {model!r}: {where} needs {len(needed)} inputs ({', '.join(needed)}), but polyfed feeds one, the "
            "examples; join the inputs in the data, as more features or channels, and separate them in the forward"
            f"{mask}"
        )
    rest = [parameter.name for parameter in takes[1:]]
    return [f"model {model!r}: {where} gets its first input alone, and {listed(rest)} the default"] if rest else []


class Prober:
    """Forward passes of a user's network on weights of its own.

    Args:
        build: builds the module anew, under the same stream of random numbers.
        module: the module, in evaluation mode.
        model: the name of the model, for messages.
        inputs: ``inputs(number, examples)``, a batch (B, ...) for each number.
        rng: the randomness of the passes.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        module: nn.Module,
        model: str,
        inputs: Callable[[int, int], Tensor],
        rng: Rng,
    ) -> None:
        self.build, self.model, self.inputs, self.rng = build, model, inputs, rng
        self.own, binding = list(places(module)), Binding(module, model)
        self.binding = binding
        copies = {place.name: place.tensor.detach().clone() for place in self.own}
        self.weights = {name: copies[name] for name in binding.shapes}
        self.constants = {name: copies[name] for name in binding.constants}
        #: The buffers that training moves, and the parameters without a gradient.
        self.moved, self.unused = set[str](), set[str]()
        #: The shape per sample of the output in training, or the name of its type.
        self.trained: tuple[int, ...] | str = ()
        self.remarks: list[str] = []
        #: The number of examples that a training forward takes: 2, or 16 where two are too few.
        self.examples = 2
        #: Trainable tensors of earlier passes that the weights do not hold.
        self._strangers: list[Tensor] = []

    def check_state(self) -> bool:
        """Raise ModelError if a forward changes or keeps what only the weights and buffers may hold.

        Returns:
            Whether it fills a cache, a plain attribute that depends on nothing but shapes.
        """
        module = self.binding.module
        other = self.build()
        if other is module:
            raise ModelError(
                f"the factory of model {self.model!r} returned the same module twice; it must build a new module"
            )
        before = {id(child) for child in module.modules()} | {id(place.tensor) for place in self.own}
        again = [path for path, child in named(other) if id(child) in before and child.state_dict()]
        again += [place.name for place in places(other) if id(place.tensor) in before]
        if again:
            raise ModelError(
                f"the factory of model {self.model!r} put the same {again[0]!r} into two new modules, so clients would "
                "share its weights; build it in __init__, or copy it there (copy.deepcopy)"
            )
        self._check_repeatable(other)
        found = [attributes(module)]
        first = self._both_modes(self.binding, 0, self.weights)
        found.append(attributes(module))
        self._both_modes(self.binding, 1, self.weights)
        found.append(attributes(module))
        names = {name for a, b in pairwise(found) for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
        if names:
            kept = {name for name in names if found[1].get(name) == found[2].get(name)}
            # A cache that depends on shapes alone is filled with the same value from other weights and other inputs.
            changed = {n: w + 0.1 if n in self.binding.parameter_names else w for n, w in self.weights.items()}
            self._both_modes(Binding(other, self.model), 2, changed)
            again = attributes(other)
            self._refuse({name for name in names if name not in kept or again.get(name) != found[2].get(name)})
        for before, now in zip(first, self._both_modes(self.binding, 0, self.weights), strict=True):
            if isinstance(before, Tensor) and not (isinstance(now, Tensor) and close(before, now)):
                raise ModelError(
                    f"model {self.model!r} gives another output for the same weights and input after it has seen other "
                    "data; keep state in a buffer (self.register_buffer), not in globals, closures or hooks, and draw "
                    "random numbers by torch, not by numpy or random"
                )
        for place in self.own:
            place.owner[place.local] = place.tensor
        return bool(names)

    def notes(self) -> list[str]:
        """Return sentences on what trains other than its user may think."""
        found = list(self.remarks)
        moving = [path for path in frozen_norms(self.binding.module)[1] if f"{path}.running_mean" in self.moved]
        if moving:
            found.append(
                f"model {self.model!r}: the parameters of {listed(moving)} are frozen, but training moves the running "
                "statistics all the same; a method train(self, mode) of the network can keep it in evaluation"
            )
        if self.unused:
            found.append(
                f"model {self.model!r}: {listed(sorted(self.unused))} got no gradient in a test, so training leaves it "
                "as it is, but it is sent all the same; with requires_grad_(False) it would not travel"
            )
        return found

    def _both_modes(self, binding: Binding, number: int, weights: Mapping[str, Tensor]) -> list[Any]:
        """Run the module in evaluation and in training mode, and return both outputs."""
        out = [self._run(binding, number, weights, training) for training in (False, True)]
        self.trained = tuple(out[1].shape[1:]) if isinstance(out[1], Tensor) else type(out[1]).__name__
        return out

    def _run(self, binding: Binding, number: int, weights: Mapping[str, Tensor], training: bool) -> Any:
        """Run the module on clones of ``weights``, and return its output."""
        given = {
            name: value.clone().requires_grad_(training and name in binding.parameter_names)
            for name, value in weights.items()
        }
        binding.module.train(training)
        binding.bind(given)
        modes = {path: child.training for path, child in named(binding.module)}
        try:
            with self.rng.at(number).fork(), torch.set_grad_enabled(training):
                out = self._trained(binding, number, given) if training else binding.module(self.inputs(number, 2))
        except ModelError:
            raise
        except Exception as error:  # user code
            raise ModelError(failed(self.model, self.inputs(0, 2), error, training)) from error
        finally:
            changed = [path for path, child in named(binding.module) if child.training != modes.get(path)]
            binding.module.train(False)
            held = binding.tensors()
            binding.release()
        if changed:
            raise ModelError(
                f"model {self.model!r} switches {listed(changed)} between training and evaluation mode in its forward, "
                "which a cut would lose; do so in a method train(self, mode) of the network, after super().train(mode)"
            )
        self._check_writes(binding, weights, given, held, training)
        return out.detach() if isinstance(out, Tensor) else out

    def _trained(self, binding: Binding, number: int, given: Mapping[str, Tensor]) -> Any:
        """Run a forward and a backward pass; with more examples where two are too few."""
        try:
            out = binding.module(self.inputs(number, 2))
        except Exception as error:  # user code
            out = None
            with suppress(Exception):
                out, self.examples = binding.module(self.inputs(number, 16)), 16
                self.remarks = [f"model {self.model!r} fails on a training batch of two examples ({fault(error)})"]
            if out is None:
                raise
        trained = {name: leaf for name, leaf in given.items() if leaf.requires_grad}
        if not isinstance(out, Tensor):
            return out
        if not out.requires_grad:
            raise ModelError(
                f"model {self.model!r}: its output depends on no parameter that could be trained (it has "
                f"{len(trained)}); does it freeze all, or run under torch.no_grad() or detach()?"
            )
        self._check_leaves(binding, out, given)
        gradients: Any = torch.autograd.grad(out.square().sum(), list(trained.values()), allow_unused=True)
        self.unused = {name for name, g in zip(trained, gradients, strict=True) if g is None}
        for name, g in zip(trained, gradients, strict=True):
            if g is not None and g.layout != torch.strided:
                raise ModelError(
                    f"model {self.model!r}: the gradient of {name!r} is sparse, which polyfed's optimizers do not "
                    "take; leave out sparse=True"
                )
        return out

    def _check_leaves(self, binding: Binding, out: Tensor, given: Mapping[str, Tensor]) -> None:
        """Raise if a gradient would reach a tensor that is none of the weights, and the same one in two passes."""
        known = {id(value) for value in given.values()}
        strangers = [leaf for leaf in leaves(out) if id(leaf) not in known]
        kept = {id(leaf) for leaf in self._strangers}
        self._strangers += strangers  # they are held, so that no other tensor gets the id of one
        for leaf in (leaf for leaf in strangers if id(leaf) in kept):
            name = next((place.name for place in places(binding.module) if place.tensor is leaf), None)
            if name is not None:
                raise ModelError(
                    f"model {self.model!r}: {name!r} requires a gradient in training, but did not in the new network, "
                    "so it would not be trained; set requires_grad in __init__ alone"
                )
            raise ModelError(
                f"model {self.model!r}: its output depends on a tensor of shape {tuple(leaf.shape)} with requires_grad"
                f"{holder(binding.module, leaf)} that torch does not register, so it would not be trained; make it an "
                "nn.Parameter, or the module that holds it an attribute of the network (of several modules: "
                "nn.ModuleList or nn.ModuleDict)"
            )

    def _check_writes(
        self,
        binding: Binding,
        before: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        held: Mapping[str, Tensor | None],
        training: bool,
    ) -> None:
        for name, tensor in held.items():
            if tensor is not given[binding.named(name)]:
                raise ModelError(
                    f"model {self.model!r} replaces {name!r} during its forward{self._line(name)}, so the change would "
                    "be lost; write into it instead: self.buffer.copy_(value)"
                )
        for name, value in given.items():
            if _same(value.detach(), before[name]):
                continue
            if name in binding.buffer_names and training:
                self.moved.add(name)
                continue
            if name in binding.parameter_names:
                raise ModelError(
                    f"model {self.model!r} writes into its parameter {name!r} during its forward{self._line(name)}; "
                    "only training may: compute with a changed copy instead, or use a buffer for a moving average"
                )
            raise ModelError(
                f"model {self.model!r} writes into its buffer {name!r} in evaluation mode{self._line(name)}, so a test "
                "would change the client that is tested; write to it under `if self.training:`"
            )
        now = {place.name: place.tensor.detach() for place in places(binding.module)}
        if late := sorted(now.keys() - {place.name for place in self.own}):
            raise ModelError(
                f"model {self.model!r} adds {listed(late)} in its forward, where no client would have it; register it "
                "in __init__"
            )
        changed = (name for name, value in self.constants.items() if not _same(value, now[name]))
        if name := next(changed, None):
            raise ModelError(
                f"model {self.model!r} writes into {name!r} during its forward{self._line(name)}, but a tensor with "
                "requires_grad False belongs to all clients; make it a buffer (self.register_buffer)"
            )

    def _check_repeatable(self, other: nn.Module) -> None:
        """Raise unless the constructor gave the same weights again."""
        now = {place.name: place.tensor.detach() for place in places(self.binding.module)}
        for place in places(other):
            if place.name not in now or not _same(place.tensor.detach(), now[place.name]):
                raise ModelError(
                    f"model {self.model!r}: {place.name!r} differs between two new modules of one seed; initialise it "
                    "by torch's functions (torch.nn.init, torch.randn), not from empty memory, numpy or random"
                )

    @torch.no_grad()
    def check_tests(self) -> None:
        """Raise ModelError unless a test can be repeated, and its last batch may be a single example."""
        module, two, one = self.binding.module, self.inputs(5, 2), self.inputs(5, 1)
        with self.rng.at(5).fork():
            before = torch.get_rng_state()
            logits = module(two)
            if not torch.equal(before, torch.get_rng_state()):
                raise ModelError(
                    f"model {self.model!r} draws random numbers in evaluation mode, so no test could be repeated; draw "
                    "them under `if self.training:`, or pass training=self.training"
                )
        if self.trained != tuple(logits.shape[1:]):
            raise ModelError(
                f"model {self.model!r} returns {self.trained} per sample in training mode and "
                f"{tuple(logits.shape[1:])} in evaluation mode; return the logits only, in both"
            )
        try:
            got = tuple(module(one).shape)
        except Exception as error:  # user code
            self.remarks.append(
                f"model {self.model!r} fails on a batch of one example in evaluation mode ({fault(error)}); a client "
                "with a single test example, or one more than a multiple of 500, would end the run"
            )
            return
        if got != (1, *logits.shape[1:]):
            raise ModelError(
                f"model {self.model!r} gives {got} for a batch of one example in evaluation mode, expected "
                f"{(1, *logits.shape[1:])}; does its forward use squeeze()? flatten(1) keeps the first dimension"
            )

    def _refuse(self, names: set[str]) -> None:
        """Raise if any attribute is named."""
        if names:
            shown = sorted(names)
            raise ModelError(
                f"model {self.model!r} changes {listed(shown)} in its forward{self._line(shown[0])}: a plain attribute"
                ", shared by all clients, so it would leak from client to client; use a buffer (self.register_buffer "
                "in __init__, self.buffer.copy_(value) in the forward), or do not store the value"
            )

    def _line(self, name: str) -> str:
        """Return " (Class, file.py, line 7)" for the line that writes to an attribute, or "" if it is not found."""
        path, _, local = name.rpartition(".")
        owner = next((child for at, child in named(self.binding.module) if at == path), self.binding.module)
        if type(owner).__module__.startswith("torch."):  # a tensor of torch's layer, to which the network writes
            owner, local = self.binding.module, name
        try:
            lines, start = inspect.getsourcelines(type(owner))
            file = inspect.getsourcefile(type(owner)) or ""
        except (OSError, TypeError):
            return ""
        place = rf"\.{re.escape(local)}\b(\[[^\]]*\]|\.\w+)*"
        for written in (
            rf"{place}\s*\S{{0,2}}=[^=]",
            rf"{place}\.(\w+_|append|appendleft|extend|insert|add|update|pop)\(",
        ):
            at = [number for number, line in enumerate(lines, start) if re.search(written, line)]
            if at:  # the constructor usually comes first, so the last line is the forward's
                return f" ({type(owner).__name__}, {Path(file).name}, line {at[-1]})"
        return ""


def _check_registered(module: nn.Module, model: str) -> None:
    """Raise if a container holds a parameter, or a module with parameters, that the module does not know."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for name, value, what, tensor in contents(module, 3, Mapping | list | tuple | set | frozenset | deque):
        if isinstance(tensor, nn.Parameter) and id(tensor) not in known:
            raise ModelError(
                f"model {model!r}: {name!r} is a {type(value).__name__} of a {what} that torch does not register, so "
                "it would not be trained; use nn.ModuleList, nn.ModuleDict, nn.ParameterList or nn.ParameterDict"
            )


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
