"""Cuts a forward pass into pieces, without rewriting it.

The module is traced symbolically; a piece of the graph is turned back into Python source and run with the
module itself as ``self``. So a piece holds no weights: it reads the tensors that are bound to the module at the
time of the call. Only the modules that contain a cut are traced inside. Every other module stays a single call,
whatever its own code does.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from polyfed.base.errors import ModelError
from polyfed.base.text import alternatives
from polyfed.models.binding import NORMS
from polyfed.models.probe import fault


@dataclass(frozen=True)
class Piece:
    """A part of a forward pass.

    Args:
        run: ``run(module, value)``, the value at the start of the piece -> the value at its end.
        targets: dotted names of the submodules, parameters and buffers that the piece uses.
        source: the code of ``run``, for comparing pieces and for reading.
    """

    run: Callable[[nn.Module, Tensor], Tensor]
    targets: frozenset[str]
    source: str


@dataclass(frozen=True)
class Pieces:
    """A forward pass as ``classify(intermediate(extract(x)))``; without an extractor, ``extract`` is None."""

    extract: Piece | None
    intermediate: Piece
    classify: Piece


def find_submodule(module: nn.Module, name: str, role: str, model: str) -> str:
    """Return the name of the submodule ``name`` in the traced graph.

    Raises:
        ModelError: the module has no such submodule; the text names the nearest submodules.
    """
    named = cast("Iterable[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    known = {path: child for path, child in named if path}
    if name not in known:
        near = alternatives(name, known)
        raise ModelError(
            f"model {model!r} has no submodule {name!r} to be its {role}; "
            f"{'nearest' if near else 'it has no submodules at all'}: {near}"
        )
    return next(path for path, child in known.items() if child is known[name])


def cut(module: nn.Module, *, classifier: str, extractor: str | None, model: str) -> Pieces:
    """Cut the forward pass of ``module``, in the mode (train or eval) it is in.

    Args:
        module: its parameters are untouched.
        classifier: the first submodule of the classifier; the cut is at its input.
        extractor: the last submodule of the extractor; the cut is at its output.
        model: the model's name, for messages.

    Raises:
        ModelError: the module cannot be traced, or a cut does not separate the input from the output.
    """
    if extractor is not None and (
        f"{classifier}.".startswith(f"{extractor}.") or f"{extractor}.".startswith(f"{classifier}.")
    ):
        raise ModelError(
            f"model {model!r}: the extractor {extractor!r} and the classifier {classifier!r} must be two "
            "separate submodules, but they are the same or nested; name submodules that follow one another"
        )
    graph = _trace(module, [name for name in (classifier, extractor) if name is not None], model)
    writes = _lost_writes(graph, model)
    start = next(node for node in graph.nodes if node.op == "placeholder")
    end = _result(graph, model)
    head = _only_call(graph, classifier, "classifier", model)
    inputs = head.all_input_nodes
    if len(inputs) != 1:
        raise ModelError(
            f"model {model!r}: the classifier {classifier!r} takes {len(inputs)} tensors "
            f"({', '.join(map(_describe, inputs))}), expected one, the representation; join them before the "
            "classifier, or name a later submodule"
        )
    r = inputs[0]
    _must_separate(graph, start, r, end, f"the classifier cut (the input of {classifier!r})", model)
    classify = _piece(graph, r, end, writes)
    if extractor is None:
        return Pieces(None, _piece(graph, start, r, writes), classify)
    s_in = _only_call(graph, extractor, "extractor", model)
    if s_in not in _needed(r, None):
        raise ModelError(
            f"model {model!r}: the extractor {extractor!r} "
            + ("comes after" if r in _needed(s_in, None) else "does not lead to")
            + f" the input of the classifier {classifier!r}; name an extractor that runs before it"
        )
    _must_separate(graph, start, s_in, r, f"the extractor cut (the output of {extractor!r})", model)
    intermediate = _piece(graph, s_in, r, writes)  # before the extractor, which takes all writes that are left
    return Pieces(_piece(graph, start, s_in, writes), intermediate, classify)


def chain(module: nn.Module, after: tuple[str, ...], model: str) -> tuple[Piece, ...]:
    """Cut the forward pass behind each of some submodules, in the mode (train or eval) the module is in.

    Args:
        module: its parameters are untouched.
        after: names of submodules, in the order in which they run.
        model: the model's name, for messages.

    Returns:
        the pieces, one more than names: to the output of the first submodule, from there to the second, and so on.

    Raises:
        ModelError: the module cannot be traced, or a cut does not separate the input from the output.
    """
    names = tuple(find_submodule(module, name, "exit", model) for name in after)
    for inner in names:
        if outer := [name for name in names if inner.startswith(f"{name}.")]:
            raise ModelError(
                f"model {model!r}: the exit {inner!r} is inside the exit {outer[0]!r}; name only one of them"
            )
    graph = _trace(module, list(names), model, "" if names else "into stages")
    writes = _lost_writes(graph, model)
    start = next(node for node in graph.nodes if node.op == "placeholder")
    end = _result(graph, model)
    points = [start, *(_only_call(graph, name, "exit", model) for name in names), end]
    for number, name in enumerate(names, 1):
        if points[number] is end or points[number - 1] not in _needed(points[number], None) - {points[number]}:
            before = "its input" if number == 1 else repr(names[number - 2])
            raise ModelError(
                f"model {model!r}: the exit {name!r} does not come after {before} and before the output; name exits in "
                "the order in which they run, each once, and not the last layer"
            )
        _must_separate(graph, start, points[number], end, f"the exit (the output of {name!r})", model)
    last_first = [_piece(graph, *ends, writes) for ends in reversed(list(pairwise(points)))]
    return tuple(reversed(last_first))  # the first piece takes all writes that are left


def stages(module: nn.Module, classifier: str | None, model: str) -> tuple[str, ...]:
    """Return the submodules that a forward pass has stages behind, in the order in which they run.

    A layer is a submodule with parameters other than a normalisation; sequences are looked into. Behind a layer, and
    what follows it up to the next layer, a stage ends where a single tensor passes: behind the last submodule there
    whose output that is, except for a flattening. The last stage, which ends before the classifier, is left out.

    Args:
        module: its parameters are untouched.
        classifier: the first submodule of the classifier; None: the last layer.
        model: the model's name, for messages.

    Raises:
        ModelError: the module cannot be traced.
    """
    named = dict(cast("Iterable[tuple[str, nn.Module]]", module.named_modules()))
    sequences = {""}
    for path, child in named.items():  # a parent comes before its children
        if path.rpartition(".")[0] in sequences and type(child).forward is nn.Sequential.forward:
            sequences.add(path)
    graph = _trace(module, [f"{path}.0" for path in sequences if path], model, "into stages")
    start, end = next(node for node in graph.nodes if node.op == "placeholder"), _result(graph, model)
    calls = {node: named[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    times = Counter(node.target for node in calls)
    layers = [n for n, m in calls.items() if any(True for _ in m.parameters()) and not isinstance(m, NORMS)]
    if not layers:
        return ()
    ways = {n: (f"{n.target}.", f"{classifier}.") for n in layers}
    last = next((n for n, (a, b) in ways.items() if a.startswith(b) or b.startswith(a)), layers[-1])
    body = _needed(last, None).intersection(layers) - {last}
    found: dict[int, str] = {}
    for node, child in calls.items():
        count = len(_needed(node, None) & body)
        if 0 < count < len(body) and times[node.target] == 1 and not isinstance(child, nn.Flatten):
            try:
                _must_separate(graph, start, node, end, "", model)
            except ModelError:
                continue  # a branch goes round it
            found[count] = str(node.target)
    return tuple(found.values())


class _AroundCuts(fx.Tracer):
    """Traces the inside of the modules that contain a cut; every other module is a single call."""

    # A traced forward must look a buffer up at each call, as it does a parameter, and not keep its value.
    proxy_buffer_attributes = True

    def __init__(self, cuts: list[str]) -> None:
        # Functions that look into a tensor's shape, such as einops.rearrange, are single calls, too.
        calls: Any = tuple(sys.modules[name] for name in ("math", "einops") if name in sys.modules)
        super().__init__(autowrap_modules=calls)
        self._cuts = cuts

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(name.startswith(f"{module_qualified_name}.") for name in self._cuts)


def _trace(module: nn.Module, cuts: list[str], model: str, where: str = "") -> fx.Graph:
    signature = inspect.signature(module.forward)
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    # A first and only argument with a default value is still the input.
    if len(defaults) == len(signature.parameters):
        defaults.pop(next(iter(defaults)), None)
    state = torch.get_rng_state()
    try:
        graph = _AroundCuts(cuts).trace(module, concrete_args=defaults or None)
    except Exception as error:  # user code runs here and may raise anything
        branches = "a forward that contains a cut may not branch on its data: move the branching into"
        calls = "a function that takes no symbols for tensors needs @torch.fx.wrap where it is defined, or a place in"
        raise ModelError(
            f"model {model!r} cannot be cut {where or 'at ' + ', '.join(map(repr, cuts))}: its forward cannot be "
            f"traced ({fault(error)}); {branches if isinstance(error, TraceError) else calls} a submodule that "
            "contains no cut, or do without a classifier cut"
        ) from error
    if not torch.equal(state, torch.get_rng_state()):
        raise ModelError(
            f"model {model!r} cannot be cut: its forward draws a random tensor that does not depend on the "
            "input, so the trace would keep a single draw; draw it in a submodule, or with torch.rand_like of "
            "an activation"
        )
    if not any(node.op == "placeholder" for node in graph.nodes):
        raise ModelError(f"model {model!r}: its forward takes no input; expected forward(self, x)")
    return graph


def _result(graph: fx.Graph, model: str) -> fx.Node:
    end = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(end, fx.Node):
        raise ModelError(
            f"model {model!r} returns {type(end).__name__}, expected one tensor (B, L); return the logits only"
        )
    return end


def _only_call(graph: fx.Graph, name: str, role: str, model: str) -> fx.Node:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1:
        raise ModelError(
            f"model {model!r}: its forward calls the {role} {name!r} {len(calls)} times, expected once; name "
            "a submodule that is called exactly once, or give this use a submodule of its own"
        )
    return calls[0]


def _needed(end: fx.Node, stop: fx.Node | None) -> set[fx.Node]:
    """Return ``end`` and all nodes that it depends on, except those before ``stop``."""
    seen: set[fx.Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node is not stop:
                todo.extend(node.all_input_nodes)
    return seen


def _depend_on(graph: fx.Graph, source: fx.Node) -> set[fx.Node]:
    """Return ``source`` and all nodes that depend on it."""
    reached = {source}
    for node in graph.nodes:  # the order of the graph puts inputs first
        if any(value in reached for value in node.all_input_nodes):
            reached.add(node)
    return reached


def _must_separate(graph: fx.Graph, start: fx.Node, at: fx.Node, end: fx.Node, where: str, model: str) -> None:
    """Raise unless every path from ``start`` to ``end`` passes through ``at``."""
    needed = _needed(end, at)
    if at not in needed:
        raise ModelError(f"model {model!r}: the result does not depend on {where}; name another submodule")
    if at is start or start not in needed:
        return
    behind, live = _depend_on(graph, at), _depend_on(graph, start)
    crossing = [
        node
        for node in graph.nodes
        if node in needed
        and node in live
        and node not in behind
        and any(user in needed and user in behind for user in node.users)
    ]
    raise ModelError(
        f"model {model!r} cannot be cut there: besides {where}, what follows also uses "
        f"{', '.join(map(_describe, crossing))}; a single tensor may pass a cut: cut where the branches have "
        "joined, or put them into one submodule"
    )


def _describe(node: fx.Node) -> str:
    texts = {
        "placeholder": f"the model's input {node.target!r}",
        "call_module": f"the output of {node.target!r}",
        "call_method": f"the result {node.name!r} of .{node.target}()",
        "call_function": f"the result {node.name!r} of {getattr(node.target, '__name__', node.target)}()",
    }
    return texts.get(node.op, repr(node.name))


def _lost_writes(graph: fx.Graph, model: str) -> list[fx.Node]:
    """Return the writes in place into a buffer whose result is unused, such as a moving average.

    Raises:
        ModelError: such a write goes into another tensor, so that no piece would contain it.
    """
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.users or node.op not in ("call_method", "call_function"):
            continue
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        if (
            node.target in (operator.setitem, setattr)
            or (name.endswith("_") and not name.endswith("__"))
            or node.kwargs.get("inplace") is True
        ):
            into = node
            while into.op in ("call_method", "call_function") and into.args and isinstance(into.args[0], fx.Node):
                into = into.args[0]
            if into.op != "get_attr":
                raise ModelError(
                    f"model {model!r} cannot be cut: its forward writes in place without using the result "
                    f"({_describe(node)}); write h = {name.rstrip('_')}(h) instead, or move it into a submodule"
                )
            found.append(node)
    return found


def _piece(graph: fx.Graph, start: fx.Node, end: fx.Node, writes: list[fx.Node]) -> Piece:
    """Return the piece from ``start`` to ``end``; it takes those of ``writes`` that need nothing before ``start``."""
    needed = _needed(end, start)
    for node in list(writes):
        apart = _needed(node, start)
        if start.op == "placeholder" or not any(other.op == "placeholder" for other in apart):
            needed |= apart
            writes.remove(node)
    piece = fx.Graph()
    copies = {start: piece.placeholder("value")}
    inside = [node for node in graph.nodes if node in needed and node is not start]
    for node in inside:
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(copies[end])
    code = piece.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<piece of a model>", "exec"), scope)
    targets = frozenset(str(node.target) for node in inside if node.op in ("call_module", "get_attr"))
    return Piece(scope["forward"], targets, code.src)
