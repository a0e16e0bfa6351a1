"""A network that runs on weights from outside, whole or in three pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from copy import copy
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as Normalisation  # pyright: ignore[reportPrivateUsage]

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.models.binding import Binding, listed, places
from polyfed.models.mlp import MLP
from polyfed.models.probe import Prober, check_input, check_module, close, complete, failed, fault
from polyfed.models.state import attributes, digest
from polyfed.models.trace import Piece, Pieces, cut, find_submodule

#: The draws of the forward passes that test a new network.
_PROBE = Rng(("polyfed.models", "probe"))


#: What a trace does not see.
_CONTEXTS = (
    "A cut loses a context around layers, such as torch.no_grad(), enable_grad() or autocast(): put it into the "
    "forward of a submodule that contains no cut"
)


class SplitModel:
    r"""Any ``nn.Module``, run on weights that are stored outside it, whole or in pieces.

    With :math:`x` of shape ``(B, *input_shape)`` the network is

    .. math:: logits = classify(r), \quad r = intermediate(s_{in}), \quad s_{in} = extract(x)

    cut at named submodules; its forward is not rewritten. Weights are a mapping from names to tensors: leaves
    that require grad, plain tensors, or tensors wrapped by ``torch.func.grad`` and ``torch.func.vmap``.

    A call puts the tensors into the module only if the mapping is another object than at the last call, so a
    mapping must not be changed between calls: make a new mapping. Changing tensors in place is fine (an
    optimiser does). In training mode the forward moves BatchNorm's statistics inside the given mapping;
    :func:`keep_statistics` prevents that. Only one thread at a time may use a model; it starts in eval mode.

    Args:
        name: the name of the model in messages.
        factory: builds a NEW module at each call.
        input_shape: shape of one sample: ``(C, H, W)``, ``(F,)``, ``(T, C)``, ``(C, T)``, or ``(T,)`` for tokens.
        classifier: dotted name of the classifier's FIRST submodule: its input is the representation
            ``(B, rep_dim)``. None: the model is not cut and only ``__call__`` works.
        extractor: dotted name of the extractor's LAST submodule: its output is ``s_in``.
        signature: equal exactly for models of the same architecture, which may then be stacked. Default: the
            factory itself, with the shape and the cuts.
        dtype: type of the input: int64 for tokens; None for the type of new tensors, such as float32.
        whole: the network of which this one has some channels or stages; None for a network that is no part.
        empty: whether it is built on torch's meta device, where tensors have shapes and no values, so that it takes no
            memory. It has names and shapes, and can be sliced: a slice has memory of its own, for weights from outside.
            An empty network and its slices have no weights to start with, and the network's own tests are left out.

    A parameter with ``requires_grad`` False is a constant of the architecture: the factory makes it under a fixed seed,
    all weights share it, and no mapping holds it. So are the statistics of a normalisation whose parameters are frozen
    and which stays in evaluation mode in training.

    Attributes:
        cuts: the names of the classifier and of the extractor.
        notes: sentences that a user should read once.
        random: whether a training forward draws random numbers.
        layer_names: names of the parameters of linear layers, convolutions, and attention's projections.
        caches: whether a forward fills plain attributes, with values that depend on nothing but shapes.

    Raises:
        ModelError: the factory or the forward fails, the network keeps state outside its buffers, or it cannot be cut
            there; or it cannot be ``empty``.

    Example:
        >>> net = lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> model = SplitModel("tiny", net, input_shape=(4,), classifier="2")
        >>> model.rep_dim, model.num_classes, sorted(model.classifier_names)
        (3, 2, ['2.bias', '2.weight'])
        >>> params = model.init(Rng((0,)))
        >>> model(params, torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        name: str,
        factory: Callable[[], nn.Module],
        *,
        input_shape: tuple[int, ...],
        classifier: str | None,
        extractor: str | None = None,
        signature: Hashable | None = None,
        dtype: torch.dtype | None = None,
        whole: SplitModel | None = None,
        empty: bool = False,
    ) -> None:
        if extractor is not None and classifier is None:
            raise ModelError(f"model {name!r} names an extractor ({extractor!r}) but no classifier; name both, or none")
        self.name = name
        self._start: Params | None = None
        self.input_shape = tuple(input_shape)
        self.signature: Hashable = (
            signature if signature is not None else (name, factory, self.input_shape, classifier, extractor)
        )
        self.dtype = dtype
        self._whole = whole
        self.empty = empty
        self.cuts = (classifier, extractor)
        self._factory = factory
        self._cut_names = (classifier, extractor)
        self._module = self._new(_PROBE)
        self._module.eval()
        check_module(self._module, name, "meta" if empty else "cpu")
        self.notes = check_input(self._module, name)
        self._binding = Binding(self._module, name)
        if empty and self.constants:
            raise ModelError(
                f"model {name!r} cannot be built without its weights: {listed(sorted(self.constants))} belong to the "
                "architecture, which the server does not send"
            )
        # polyfed's own networks keep no state, and to find that out takes several passes.
        own = not type(self._module).__module__.startswith("polyfed.")
        own = own and not empty
        prober = Prober(lambda: self._new(_PROBE), self._module, name, self.inputs, _PROBE) if own else None
        self.caches = prober is not None and prober.check_state()
        plain = attributes(self._module)
        self.shapes = self._binding.shapes
        self.parameter_names = self._binding.parameter_names
        self.buffer_names = self._binding.buffer_names
        self.norm_names = self._binding.norm_names
        self.layer_names = self._binding.layer_names
        self._pieces: dict[bool, Pieces] | None = None
        if classifier is not None:
            self._cut(classifier, extractor)
            if attributes(self._module) != plain:
                raise ModelError(
                    f"model {name!r} cannot be cut: its forward stores a value in an attribute, in whose place the cut "
                    "would store a symbol; store it in the forward of a submodule that contains no cut"
                )
        self._clobbers: frozenset[str] = frozenset()
        self._probe()
        if prober is not None:
            if self._pieces is not None:
                self._check_gradients(prober.examples)
            prober.check_tests()
            self.notes += prober.notes()

    def __repr__(self) -> str:
        """The name and the sizes."""
        weights = sum(self.shapes[name].numel() for name in self.parameter_names)
        return f"SplitModel({self.name!r}, {self.input_shape} -> {self.num_classes}, {weights:,} parameters)"

    def fresh(self) -> SplitModel:
        """Return the same network around a new module, for a user that does not share it; it is probed again."""
        classifier, extractor = self._cut_names
        return SplitModel(
            self.name,
            self._factory,
            input_shape=self.input_shape,
            classifier=classifier,
            extractor=extractor,
            signature=self.signature,
            dtype=self.dtype,
            whole=self._whole,
        )

    @property
    def whole(self) -> SplitModel:
        """The network of which this one has some channels or stages; itself if it is no part of another."""
        return self if self._whole is None else self._whole

    @property
    def device(self) -> torch.device:
        """Where new modules have their tensors: the CPU, or for an ``empty`` network the meta device."""
        return torch.device("meta" if self.empty else "cpu")

    @property
    def described(self) -> str:
        """The layers, as torch prints a module."""
        return repr(self._module)

    def lend(self, constants: Params) -> None:
        """Let the module read these tensors in place of its own `constants`, from now on."""
        self._binding.lend(constants)

    def release(self) -> None:
        """Forget the weights of the last call, so that they do not stay in memory."""
        self._binding.release()

    # ------------------------------------------------------------------------------------------------ weights

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Return new weights and buffers, the same for the same ``rng``; no global generator is used.

        After `starting_with` they are copies of the given weights, whatever ``rng``.
        """
        if self._start is not None:
            return {name: value.clone() for name, value in self._start.items()}
        if self.whole.empty:
            raise ModelError(f"model {self.name!r} was built without weights; the server sends them")
        return self._drawn(rng)

    def _drawn(self, rng: Rng) -> dict[str, Tensor]:
        module = self._new(rng)
        if module is self._module:
            raise ModelError(
                f"the factory of model {self.name!r} returned the same module twice; it must build a new module"
            )
        found = ((place.name, place.tensor.detach().contiguous()) for place in places(module))
        tensors = {name: tensor for name, tensor in found if name not in self._binding.constants}
        self._binding.check(tensors)
        return tensors

    def starting_with(self, weights: Params) -> SplitModel:
        """Return this model with ``weights`` as what `init` returns; it shares the module with this one.

        Args:
            weights: all tensors, with the names and shapes of `shapes`.
        """
        self._binding.check(weights)
        other = copy(self)
        other._start = weights
        return other

    @property
    def constants(self) -> Params:
        """The tensors that all weights share, by name: frozen parameters, and still statistics beside them."""
        return self._binding.constants

    @cached_property
    def constants_digest(self) -> str:
        """A digest (hex) of `constants`; "" without any."""
        found = {name: digest(value) for name, value in sorted(self.constants.items())}
        return sha256(repr(found).encode()).hexdigest() if found else ""

    @property
    def leniency(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Beginnings of names that a file of weights may lack, and of names there that are passed over.

        They are the attributes ``may_lack`` and ``passed_over`` of a network whose pretrained files are of other tasks.
        """
        return getattr(self._module, "may_lack", ()), getattr(self._module, "passed_over", ())

    @property
    def training(self) -> bool:
        """Whether the next calls behave as in training."""
        return self._module.training

    def train(self, mode: bool) -> None:
        """Let BatchNorm and dropout behave as in training (True) or evaluation (False) from now on."""
        if mode != self._module.training:
            self._module.train(mode)

    # ------------------------------------------------------------------------------------------------ running

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of ``x``, ``(B, *input_shape)``."""
        if params is not self._binding.bound:
            self._binding.bind(params)
        return self._module(x.clone() if "whole" in self._clobbers else x)

    @property
    def statistic_names(self) -> frozenset[str]:
        """Names of the running means and variances of normalisation layers."""
        return frozenset(
            f"{path}.{kind}".lstrip(".") for path, _ in self._counting() for kind in ("running_mean", "running_var")
        ).intersection(self.buffer_names)

    def batch_statistics(self, params: Params, x: Tensor) -> dict[str, Tensor]:
        """Return the statistics of the normalisation layers on ``x`` alone: its means and its unbiased variances.

        Every other layer behaves as in the mode that `train` set. Neither ``params`` nor the mode changes.

        Args:
            params: all tensors.
            x: ``(B, *input_shape)``, with B of at least 2.

        Returns:
            the tensors called `statistic_names`.
        """
        found = keep_statistics(self, params)
        layers = [layer for _, layer in self._counting()]
        before = [(layer.training, layer.momentum) for layer in layers]
        for layer in layers:
            layer.training, layer.momentum = True, 1.0  # at momentum 1 the batch's statistics replace the running ones
        try:
            self(found, x)
        finally:
            for layer, (mode, momentum) in zip(layers, before, strict=True):
                layer.training, layer.momentum = mode, momentum
        return {name: found[name] for name in sorted(self.statistic_names)}

    def _counting(self) -> list[tuple[str, Normalisation]]:
        """The normalisation layers that keep running statistics which `shapes` has, by place."""
        named = cast("Iterable[tuple[str, nn.Module]]", self._module.named_modules())
        return [
            (path, layer)
            for path, layer in named
            if isinstance(layer, Normalisation) and f"{path}.running_mean".lstrip(".") in self.buffer_names
        ]

    def represent(self, params: Params, x: Tensor) -> Tensor:
        """Return the representation ``(B, rep_dim)``, the input of the classifier."""
        pieces = self._cuts()
        if pieces.extract is not None:
            return self.intermediate(params, self.extract(params, x))
        return self._run("intermediate", pieces.intermediate, params, x)

    def extract(self, params: Params, x: Tensor) -> Tensor:
        """The extractor's output ``(B, *s_in_shape)``."""
        return self._run("extract", self._extractor(), params, x)

    def intermediate(self, params: Params, s_in: Tensor) -> Tensor:
        """From the extractor's output ``(B, *s_in_shape)`` to the representation ``(B, rep_dim)``."""
        self._extractor()
        return self._run("intermediate", self._cuts().intermediate, params, s_in)

    def classify(self, params: Params, r: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of representations ``(B, rep_dim)``."""
        return self._run("classify", self._cuts().classify, params, r)

    def inputs(self, number: int, examples: int = 2) -> Tensor:
        """Return a batch ``(examples, *input_shape)`` that tests a network, another for each number.

        Tokens are 0, which is often padding, and 1: those that every vocabulary has. The first of a row is 1.
        """
        shape, draw = (examples, *self.input_shape), _PROBE.at("x", number).torch()
        if self.dtype is None or self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, generator=draw).to(self.device)
        tokens = torch.randint(0, 2, shape, dtype=self.dtype, generator=draw)
        tokens[:, 0] = 1
        return tokens.to(self.device)

    def check_tokens(self, x: Tensor) -> None:
        """Raise unless the network takes these one or two rows of the data, ``(B, T)`` int64, and keeps none of them.

        Raises:
            ModelError: a pass fails, such as on a token that an embedding lacks, or the network keeps state that the
                tokens 0 and 1, with which it was tested when it was new, do not show.
        """

        def inputs(number: int, examples: int) -> Tensor:
            return x[torch.arange(examples) % len(x)] if number == 1 else self.inputs(number, examples)

        try:
            Prober(lambda: self._new(_PROBE), self._new(_PROBE).eval(), self.name, inputs, _PROBE).check_state()
        except ModelError as error:
            if error.__cause__ is None:
                raise
            raise ModelError(
                f"model {self.name!r} fails on tokens from {int(x.min())} to {int(x.max())}, as the data have: "
                f"{fault(error.__cause__)}; an embedding of them needs more than {int(x.max())} rows, tokens and "
                "padding are numbers from 0, and a row may be padding alone"
            ) from error.__cause__

    # ------------------------------------------------------------------------------------------------ anatomy

    @property
    def columns(self) -> tuple[int, ...]:
        """Positions of the features that it reads, of an mlp with the option ``columns``; of another network none."""
        return self._module.columns if isinstance(self._module, MLP) else ()

    @property
    def rep_dim(self) -> int:
        """Width of the representation."""
        self._cuts()
        return self._rep_dim

    @property
    def s_in_shape(self) -> tuple[int, ...]:
        """Shape of the extractor's output, per sample."""
        self._extractor()
        return self._s_in_shape

    @property
    def s_out_shape(self) -> tuple[int, ...]:
        """Shape of the representation, per sample: ``(rep_dim,)``."""
        return (self.rep_dim,)

    @property
    def extractor_names(self) -> frozenset[str]:
        """Names of the extractor's parameters and buffers; empty without an extractor cut."""
        self._cuts()
        return self._names["extractor"]

    @property
    def intermediate_names(self) -> frozenset[str]:
        """Names of the parameters and buffers outside extractor and classifier."""
        self._cuts()
        return self._names["intermediate"]

    @property
    def classifier_names(self) -> frozenset[str]:
        """Names of the classifier's parameters and buffers."""
        self._cuts()
        return self._names["classifier"]

    @cached_property
    def single_fault(self) -> str | None:
        """The error of a training forward on a batch of one example, such as BatchNorm's; None if there is none."""
        self.train(True)
        try:
            with _PROBE.fork(), torch.no_grad():
                logits = self(self._drawn(_PROBE), self.inputs(0, 1))
            return None if logits.shape == (1, self.num_classes) else f"it returns {tuple(logits.shape)}"
        except Exception as error:  # user code
            return fault(error)
        finally:
            self.train(False)

    def head(self, params: Params) -> dict[str, Tensor]:
        """Return the classifier's tensors under names without its place in the network: ``weight`` for ``fc3.weight``.

        So networks whose classifiers have different names can share them.
        """
        return {short: params[name] for short, name in self._head_names().items()}

    def body(self, params: Params) -> dict[str, Tensor]:
        """Return ``params`` without the classifier's tensors; `with_head` is the inverse."""
        return {name: value for name, value in params.items() if name not in self.classifier_names}

    def with_head(self, params: Params, head: Params) -> dict[str, Tensor]:
        """Return ``params``, which may lack a classifier, with the tensors of ``head`` as its classifier.

        Raises:
            ModelError: ``head`` does not have this classifier's names and shapes.
        """
        names = self._head_names()
        expected, got = self.head_shapes, {short: tuple(value.shape) for short, value in head.items()}
        if got != expected:
            raise ModelError(
                f"model {self.name!r} got a head {got}; expected {expected}, as its classifier has; "
                "choose models, or cuts, with equal classifiers"
            )
        return {**params, **{names[short]: value for short, value in head.items()}}

    def _head_names(self) -> dict[str, str]:
        """Short name -> name of each tensor of the classifier."""
        names = [name.split(".") for name in self.shapes if name in self.classifier_names]
        levels = zip(*(name[:-1] for name in names), strict=False)
        same = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        return {".".join(name[same:]): ".".join(name) for name in names}

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the classifier's tensors, by the names of `head`."""
        return {short: tuple(self.shapes[name]) for short, name in self._head_names().items()}

    # ------------------------------------------------------------------------------------------------ private

    def _run(self, which: str, piece: Piece, params: Params, value: Tensor) -> Tensor:
        if params is not self._binding.bound:
            self._binding.bind(params)
        return piece.run(self._module, value.clone() if which in self._clobbers else value)

    def _new(self, rng: Rng) -> nn.Module:
        """Build the module under ``rng``, with all its lazy layers."""
        with rng.fork():
            return self.new_module()

    def new_module(self) -> nn.Module:
        """Return a new module with all its lazy layers, drawn by torch's generator as it stands."""
        with self.device if self.empty else nullcontext():
            module = self._build()
        try:
            complete(module, self.inputs(0))
        except Exception as error:  # user code
            raise ModelError(
                f"model {self.name!r} has lazy layers, and the forward pass that would give them shapes fails on "
                f"an input of shape {(2, *self.input_shape)}: {fault(error)}"
            ) from error
        return module

    def _build(self) -> nn.Module:
        try:
            module = self._factory()
        except ModelError:
            raise
        except Exception as error:  # user code
            raise ModelError(f"model {self.name!r} cannot be built: its constructor raised {fault(error)}") from error
        if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelError(f"the factory of model {self.name!r} returned {type(module).__name__}, not nn.Module")
        return module

    def _cut(self, classifier: str, extractor: str | None) -> None:
        classifier = find_submodule(self._module, classifier, "classifier", self.name)
        if extractor is not None:
            extractor = find_submodule(self._module, extractor, "extractor", self.name)
        # Functional dropout reads self.training during the trace, so each mode has its own graph.
        self._pieces = {}
        with _PROBE.fork():
            for mode in (True, False):
                self._module.train(mode)
                self._pieces[mode] = cut(self._module, classifier=classifier, extractor=extractor, model=self.name)
        both = self._pieces.values()
        owned = self._binding.owned
        head = owned(target for pieces in both for target in pieces.classify.targets)
        body = owned(target for pieces in both for target in pieces.intermediate.targets)
        front = owned(target for pieces in both if pieces.extract for target in pieces.extract.targets)
        shared = (head & body) | (head & front) | (body & front)
        if shared:
            raise ModelError(
                f"model {self.name!r} cannot be cut there: {listed(sorted(shared))} would belong to two "
                "pieces; untie the weight, or cut where both uses are on one side"
            )
        self._names = {
            "extractor": front,
            "classifier": head,
            "intermediate": frozenset(self.shapes) - head - front,  # includes tensors that the forward never uses
        }

    def _cuts(self) -> Pieces:
        if self._pieces is None:
            raise ModelError(
                f"model {self.name!r} has no classifier cut, so it has no representation; "
                'name the first submodule of its classifier (classifier = "...")'
            )
        return self._pieces[self._module.training]

    def _extractor(self) -> Piece:
        piece = self._cuts().extract
        if piece is None:
            raise ModelError(
                f"model {self.name!r} has no extractor cut; "
                'name the last submodule of its extractor (extractor = "...")'
            )
        return piece

    @torch.no_grad()
    def _probe(self) -> None:
        """Run the model once in each mode, to learn its widths and properties."""
        x = self.inputs(0)
        before = x._version
        with _PROBE.fork():
            try:
                logits = self._module(x)
            except Exception as error:  # user code
                raise ModelError(failed(self.name, x, error)) from error
        clobbers = {"whole"} if x._version != before else set[str]()
        wrong = (
            f" returned {{}} for an input of shape {tuple(x.shape)}, expected one tensor (2, L): a row of logits per "
            "sample"
        )
        self.num_classes = self._per_sample(logits, wrong, 2, 2)[0]
        if self._pieces is not None:
            # A new input, as the forward above may have written into x.
            x = self.inputs(0)
            self._s_in_shape, self._rep_dim, again = self._walk(x, clobbers)
            if not self.empty and not torch.allclose(again, logits, rtol=0, atol=0, equal_nan=True):
                raise ModelError(
                    f"model {self.name!r} cannot be cut there: its pieces in a row differ from its forward; "
                    f"does the forward write into tensors in place, or use randomness in eval mode? {_CONTEXTS}"
                )
        self.random = self._probe_training(x, clobbers)
        self._clobbers = frozenset(clobbers)

    def _check_gradients(self, examples: int) -> None:
        """Raise unless the pieces in a row have the gradients of the whole, on a batch of so many examples."""
        found: list[Any] = []
        names, weights = sorted(self.parameter_names), self._drawn(_PROBE)
        self.train(True)
        try:
            for cut_apart in (False, True):
                params = {n: value.clone().requires_grad_(n in self.parameter_names) for n, value in weights.items()}
                x = self.inputs(0, examples)
                with _PROBE.fork(), torch.enable_grad():
                    out = self.classify(params, self.represent(params, x)) if cut_apart else self(params, x)
                    leaves = [params[name] for name in names]
                    found.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
        except Exception as error:  # user code
            if found:  # else two examples are too few for the whole, too
                raise ModelError(
                    f"model {self.name!r} cannot be cut there: its pieces cannot be trained ({fault(error)}). "
                    f"{_CONTEXTS}"
                ) from error
            return
        finally:
            self.train(False)
        for name, whole, pieces in zip(names, *found, strict=True):
            if (whole is None) != (pieces is None) or not (whole is None or close(whole, pieces)):
                raise ModelError(
                    f"model {self.name!r} cannot be cut there: the gradient of {name!r} in its pieces differs from "
                    f"that in its forward. {_CONTEXTS}"
                )

    def _walk(self, x: Tensor, clobbers: set[str]) -> tuple[tuple[int, ...], int, Tensor]:
        """Run the pieces in turn: (shape of s_in, or () without an extractor cut; width of r; logits).

        ``clobbers`` receives the pieces that write into their input.
        """
        pieces, s_in_shape = self._cuts(), ()

        def run(which: str, piece: Piece, value: Tensor) -> Tensor:
            given = value.clone()  # a piece may write into its input, or return it
            before = given._version
            try:
                result = piece.run(self._module, given)
            except Exception as error:  # user code
                raise ModelError(
                    f"model {self.name!r} cannot be cut there: its pieces fail ({fault(error)}) where its forward does "
                    f"not. {_CONTEXTS}"
                ) from error
            if given._version != before:
                clobbers.add(which)
            return result

        if pieces.extract is not None:
            x = run("extract", pieces.extract, x)
            wrong = (
                ": the extractor's output is {} for 2 samples, expected one tensor (2, ...); name a submodule that "
                "returns one tensor"
            )
            s_in_shape = self._per_sample(x, wrong, 1)
        r = run("intermediate", pieces.intermediate, x)
        wrong = (
            ": the representation, the classifier's input, is {} for 2 samples, expected (2, rep_dim); flatten it "
            "before the classifier, or name the submodule that follows the flattening"
        )
        return s_in_shape, self._per_sample(r, wrong, 2, 2)[0], run("classify", pieces.classify, r)

    def _per_sample(self, value: object, fault: str, fewest: int, most: float = math.inf) -> tuple[int, ...]:
        """Return the shape per sample of a value for two samples, of ``fewest`` to ``most`` dimensions.

        ``fault`` is the text of the error, with ``{}`` for the value.
        """
        if not isinstance(value, Tensor) or not fewest <= value.dim() <= most or value.shape[0] != 2:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"model {self.name!r}{fault.format(got)}")
        return tuple(value.shape[1:])

    def _probe_training(self, x: Tensor, clobbers: set[str]) -> bool:
        """Return whether a training forward uses torch's generator, found by running it."""
        self.train(True)
        try:
            with _PROBE.fork():
                before, version = torch.get_rng_state(), x._version
                self._module(x)
                moved = not torch.equal(before, torch.get_rng_state())
                if x._version != version:
                    clobbers.add("whole")
                if self._pieces is not None:
                    self._walk(x, clobbers)
        except Exception:  # two samples may be too few for training mode: judge by the layers
            moved = any(
                isinstance(child, nn.RReLU) or getattr(child, "p", 0) or getattr(child, "dropout", 0)
                for child in self._module.modules()
            )
        finally:
            self.train(False)
        return moved


def keep_statistics(model: SplitModel, params: Params) -> dict[str, Tensor]:
    """Return the same parameters with copies of the buffers.

    A training forward on the result moves BatchNorm's statistics in the copies, not in ``params``.
    """
    return {name: tensor.clone() if name in model.buffer_names else tensor for name, tensor in params.items()}
