"""The laws. Each is a test, run for every algorithm under test; its docstring says what fault it catches.

Collected by ``pytest --algorithm NAME`` (see `polyfed.testing`), or by a test module of your own that says

    from polyfed.testing.laws import *
    ALGORITHMS = ["my_pkg.my_file:MyMethod"]
"""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.node import map_arg

from polyfed.base.errors import DivergedError, MessageError
from polyfed.base.types import ClientId
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.message import Message, State, encode
from polyfed.core.requests import Exchange, drive
from polyfed.data.client import ClientData
from polyfed.execute.local_training import bind
from polyfed.execute.placement import Placement
from polyfed.rounds.callbacks import Quiet
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.gathering import Gathering
from polyfed.rounds.round import play_round
from polyfed.rounds.scoring import Scorer
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.run_dir import SavedRun
from polyfed.testing.clients import Backwards, Shuffled, Visit, Watched, Wired
from polyfed.testing.compare import differences, digest, furthest, leaves, tensors
from polyfed.testing.process import Child
from polyfed.testing.read_back import read_back
from polyfed.testing.settings import Tables
from polyfed.testing.subject import (
    Run,
    Subject,
    elsewhere,
    here,
    make_driver,
    play,
    workers,
)
from polyfed.trained.export import Format, export
from polyfed.trained.load import trained_model
from polyfed.trained.model import TrainedModel

__all__ = [
    "child",
    "pytest_generate_tests",
    "subject",
    "test_a_client_does_not_depend_on_who_trained_before",
    "test_batched_equals_sequential",
    "test_batched_equals_sequential_in_single_precision",
    "test_broadcast_does_not_depend_on_the_id",
    "test_bystanders_keep_their_state",
    "test_bytes_are_what_is_encoded",
    "test_channels_last_equals_sequential",
    "test_divergence_is_named",
    "test_equal_answers_count_once",
    "test_examples_weigh",
    "test_idle_rounds_change_nothing",
    "test_inputs_are_not_written_to",
    "test_labels_are_weighed",
    "test_learns",
    "test_numbers_do_not_depend_on_how_many_rounds_follow",
    "test_order_of_the_answers_does_not_matter",
    "test_order_of_the_clients_does_not_matter",
    "test_order_of_the_replies_does_not_matter",
    "test_other_process_same_run",
    "test_predicting_writes_nothing",
    "test_private_state_is_never_sent",
    "test_replayed_equals_stacked",
    "test_resumed_run_is_the_same_run",
    "test_same_configuration_same_run",
    "test_state_cannot_be_encoded",
    "test_through_the_wire_same_run",
    "test_trained_models_say_what_the_trainer_says",
    "test_two_workers_same_run",
]

BOTH = pytest.mark.parametrize("driver", ["sequential", "batched"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per algorithm: those that the module names as ``ALGORITHMS``, else those of ``--algorithm``."""
    if "subject" in metafunc.fixturenames:
        asked: Sequence[str] = metafunc.config.getoption("polyfed_algorithms", None) or ()
        names = getattr(metafunc.module, "ALGORITHMS", asked)
        metafunc.parametrize("subject", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The algorithm under test; shared by all laws, so that they share runs."""
    path = request.config.getoption("polyfed_law_config", None)
    given = tomllib.loads(Path(path).read_text(encoding="utf-8")) if path else None
    return Subject(request.param, tmp_path_factory.mktemp("laws"), given)


@pytest.fixture(scope="session")
def child() -> Generator[Child]:
    """One other process for all algorithms: starting torch takes it a second."""
    process = Child()
    yield process
    process.close()


def same(a: Run[Any], b: Run[Any]) -> None:
    """Two runs are bitwise the same: the server after every round, every private state at the end."""
    assert len(a.servers) == len(b.servers)
    for round_, (left, right) in enumerate(zip(a.servers, b.servers, strict=True)):
        assert not differences(left, right), f"the server's state after round {round_}"
    for client, state in a.privates.items():
        assert not differences(state, b.privates[client]), f"the private state of client {client}"


def close(a: Run[Any], b: Run[Any]) -> None:
    """Two runs are the same within 1e-9 of each tensor's norm: the server after every round, every private state."""
    for round_, (left, right) in enumerate(zip(a.servers, b.servers, strict=True)):
        near(left, right, f"the server after round {round_}: ")
    for client, state in b.privates.items():
        near(a.privates[client], state, f"client {client}: ")


def near(a: Any, b: Any, what: str = "", *, per_client: bool = True) -> None:
    """Two records are the same within 1e-9 of each tensor's norm; ``what`` they are begins the sentence if not."""
    gap, where = furthest(a, b, per_client=per_client)
    assert gap <= 1e-9, f"{what}{where} is {gap:.1e} off"


# ------------------------------------------------------------------------------------------------------- drivers


def test_batched_equals_sequential(subject: Subject) -> None:
    """Stacked clients compute what single ones do: in double precision within 1e-9 of each tensor's norm.

    Catches losses that mix clients or read global state under vmap, BatchNorm statistics that are shared or lost,
    another order of batches, and a batched driver that quietly takes the sequential way.
    """
    one, many = subject.run("sequential"), subject.run("batched")
    fits = one.driver.paths["sequential"]
    assert fits > 0, "no client trained: is a `yield from` missing?"
    assert many.driver.paths["stacked"] == fits, f"{dict(many.driver.paths)} of {fits} fits"
    close(many, one)


def test_batched_equals_sequential_in_single_precision(subject: Subject) -> None:
    """In single precision drivers drift apart by rounding only.

    One step from a common state stays within 1e-6. After three rounds the median client does so too, and the worst is
    within 5e-3: a ReLU or a mask may flip. Catches what double precision hides, such as sums in half precision.
    """
    one_step = subject.calm({"train": {"epochs": None, "steps": 1}})
    gaps = _gaps(*(play(one_step, here(Watched), rounds=1, driver=driver) for driver in ("sequential", "batched")))
    assert max(gaps) <= 1e-6, f"one step from a common state: {sorted(gaps)}"
    gaps = _gaps(*(play(subject.calm(), here(Watched), driver=driver) for driver in ("sequential", "batched")))
    assert statistics.median(gaps) <= 1e-6, f"the median of {sorted(gaps)}"
    assert max(gaps) <= 5e-3, f"the worst of {sorted(gaps)}"


def _gaps(one: Run[Watched], many: Run[Watched]) -> list[float]:
    """For each client how far what it last trained is apart: over the norm of all of it together."""
    last = [{visit.client: visit.trained for visit in run.clients.visits} for run in (one, many)]
    gaps: list[float] = []
    for client, parts in last[0].items():
        ours, theirs = tensors(parts), tensors(last[1][client])
        pairs = [(ours[path].double(), theirs[path].double()) for path in ours]
        norm = sum(float(a.square().sum()) for a, _ in pairs)
        gaps.append((sum(float((a - b).square().sum()) for a, b in pairs) / norm) ** 0.5 if norm else 0.0)
    return gaps


def test_replayed_equals_stacked(subject: Subject) -> None:
    """Steps of stacked clients that are replayed from a trace do what they do as they are, within 1e-9 of each norm.

    Not bitwise: the gradient of a dense layer goes into the weights as the two factors that it is the product of.
    Catches losses that depend on more than their tensors, such as the round or a counter, and losses that read a number
    out of a tensor: such clients cannot be stacked, and train one by one.
    """
    # Few kinds of steps, as a trace of a deep network takes seconds: one network, dense where the algorithm takes such
    # ones, batches of one size; an update that takes factors.
    network = str(subject.calm().config.clients.models[0])
    even: Tables = {"clients": {"models": [network]}, "partition": {"kind": "iid", "alpha": None, "min_samples": None}}
    full: Tables = {"train": {"epochs": None, "steps": 3, "batch_size": 9, "optimizer": "sgd", "momentum": 0.0}}
    replayed, stacked = (
        play(subject.calm(even, full), here(LocalClients), rounds=2, driver=driver, precision="fp64")
        for driver in ("replayed", "batched")
    )
    paths = replayed.driver.paths
    assert set(paths) == {"stacked"}, f"fits were not all stacked: {dict(paths)}"
    close(replayed, stacked)


def test_channels_last_equals_sequential(subject: Subject) -> None:
    """With the channels of images innermost, clients compute the same within 1e-9 of each tensor's norm.

    Catches views and reshapes that count on one layout, and gradients that are laid out unlike their weights.
    """
    one, other = subject.run("sequential"), subject.run("channels-last")
    close(other, one)
    for client in one.privates:
        laid = [path for path, tensor in tensors(other.privates[client]).items() if not tensor.is_contiguous()]
        assert not laid, f"client {client} keeps {laid[0]} in another layout"


def test_two_workers_same_run(subject: Subject) -> None:
    """Two processes with one thread each, the clients dealt to them, give bitwise the run of one thread.

    Catches work that depends on who else is in the process, private states that are lost or left behind when a client
    is dealt to another worker, and messages that arrive changed.
    """
    with workers(2) as dealt:
        same(play(subject.federation(), dealt), subject.run("sequential", "fp32"))


@BOTH
def test_same_configuration_same_run(subject: Subject, driver: str) -> None:
    """The same configuration gives bitwise the same run.

    Catches draws from a global generator, from the clock or the order of a set, and state kept in a module or class
    from one run to the next.
    """
    same(play(subject.federation(), here(LocalClients), driver=driver, precision="fp64"), subject.run(driver))


def test_order_of_the_clients_does_not_matter(subject: Subject) -> None:
    """Clients that run in descending order give bitwise the same run.

    Catches one client's work that leaks into the next one's: a shared optimizer, generator or buffer.
    """
    same(play(subject.federation(), here(Backwards)), subject.run("sequential", "fp32"))


def test_order_of_the_replies_does_not_matter(subject: Subject) -> None:
    """Replies that come in descending order and wait until all are there give bitwise the run of those in order.

    Catches totals that depend on who was fast, sums that keep a reply they were given, and uploads that arrive changed
    when they have waited.
    """
    same(play(subject.federation(), here(Shuffled)), subject.run("sequential", "fp32"))


@BOTH
def test_a_client_does_not_depend_on_who_trained_before(subject: Subject, driver: str) -> None:
    """Client B after client A keeps and sends what B alone does; within 1e-9 where they were stacked.

    Catches momentum or Adam moments that leak between clients, and results that depend on who else is in the stack.
    """
    first, second = [info.id for info in _alike(subject)[:2]]
    alone = _visits(subject, [second], driver)[second]
    after = _visits(subject, [first, second], driver)[second]
    for left, right in ((after.after, alone.after), (after.up, alone.up)):
        if driver == "sequential":
            assert not differences(left, right), f"client {second} depends on client {first}, who trains before it"
        else:
            gap, where = furthest(left, right)
            assert gap <= 1e-9, f"{where} of client {second} is {gap:.1e} off if client {first} trains before it"


def _visits(subject: Subject, clients: list[ClientId], driver: str) -> dict[ClientId, Visit]:
    """What these clients do in the first exchange of round 2, with the messages that the whole cohort is sent."""
    federation, server = subject.federation(), subject.run().servers[1]
    works = make_driver(driver, "fp64")
    met = here(Watched)(federation, works)
    for visit in subject.run().clients.visits:
        if visit.round == 2:  # they come as they left the first round
            met.store.put(visit.client, visit.before, 1)
    with works.placement.defaults():
        steps = federation.algorithm.server_round(server, draw_cohort(federation, 2))
        request = next(steps)
        while not isinstance(request, Exchange):
            request = steps.send(works.perform(request))
        met.exchange(replace(request, down={client: request.down[client] for client in clients}))
        steps.close()
    return {visit.client: visit for visit in met.visits}


# ---------------------------------------------------------------------------------------------------- boundaries


def test_through_the_wire_same_run(subject: Subject) -> None:
    """A run whose every message is what `decode` makes of `encode`'s bytes is bitwise the same run.

    Catches messages that are not declared, values that lose their type or precision, receivers that write into an
    object that the sender still holds, and uploads that the algorithm's own `check_upload` refuses.
    """
    same(_wired(subject), subject.run("sequential", "fp32"))


def _wired(subject: Subject) -> Run[Any]:
    return subject.once("wired", lambda: play(subject.federation(), here(Wired)))


def test_bytes_are_what_is_encoded(subject: Subject) -> None:
    """The bytes on the bill are the length of what is encoded, and values and indices the bytes of its tensors.

    Catches traffic that is estimated, and masks or positions that travel free of charge.
    """
    for message, told, length in _wired(subject).clients.sizes:
        kind = type(message).__qualname__
        assert told.total == length, f"{kind}: size() says {told.total}, encode() writes {length} bytes"
        inside = sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(message) if isinstance(leaf, Tensor))
        assert told.values + told.indices == inside, f"{kind}: {told} for {inside} bytes of tensors"


def test_other_process_same_run(subject: Subject, child: Child) -> None:
    """Clients in another process, met through bytes alone, give bitwise the same run.

    Catches whatever server and clients share behind the messages' back: attributes of the algorithm, module globals,
    the data set, an object both hold.
    """
    reference = subject.run("sequential", "fp32")
    there = play(subject.federation(), elsewhere(child, subject.folder))
    for round_, (left, right) in enumerate(zip(there.servers, reference.servers, strict=True)):
        assert not differences(left, right), f"the server's state after round {round_}"
    assert there.clients.digests() == {k: digest(state) for k, state in reference.privates.items()}, "private states"
    scores = [
        {client: (score.examples, score.correct, score.down) for client, score in _evaluated(run).scores.items()}
        for run in (there, reference)
    ]
    assert scores[0] == scores[1], "scores"


def _evaluated(run: Run[Any]) -> Evaluation:
    everyone = range(run.federation.config.clients.count)
    with run.driver.placement.defaults():
        return Evaluator(run.federation, run.driver, run.federation.data).evaluate(
            run.servers[-1], run.clients, len(run.servers) - 1, everyone
        )


def test_private_state_is_never_sent(subject: Subject) -> None:
    """No upload contains a tensor of its sender's private state: neither whole nor in pieces, nor reordered.

    Catches the private model in the upload. A field that travels by design is named in its class:
    ``public = ("student",)``.
    """
    for visit in subject.run().clients.visits:
        sent = [leaf.reshape(-1) for leaf in tensors(visit.up).values()]
        if not sent:
            continue
        uploaded = torch.cat(sent).unique()
        for state in (visit.before, visit.after):
            public: tuple[str, ...] = getattr(type(state), "public", ())
            for path, leaf in tensors(state).items():
                values = leaf[leaf != 0].unique()
                # A few equal numbers, such as a fresh BatchNorm's ones, say nothing.
                if path.partition(".")[0] in public or len(values) <= 8:
                    continue
                values = values.to(uploaded.dtype)
                nearest = torch.searchsorted(uploaded, values).clamp(max=len(uploaded) - 1)
                share = float((uploaded[nearest] == values).double().mean())
                assert share < 0.5, f"client {visit.client} sent {share:.0%} of its private {path}"


def test_state_cannot_be_encoded(subject: Subject) -> None:
    """`encode` refuses what server and clients keep.

    Catches a state class that is also a message, by which private values could leave by mistake.
    """
    run = subject.run()
    for state in (*run.servers, *run.privates.values()):
        with pytest.raises(MessageError):
            encode(state)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------- value semantics


@BOTH
def test_inputs_are_not_written_to(subject: Subject, driver: str) -> None:
    """Server states, private states and messages are after the run what they were when they were made.

    Catches averages accumulated in the first client's upload, training in place of what was received, and BatchNorm
    statistics moved in the sender's tensors.
    """
    run = subject.run(driver)
    for visit in run.clients.visits:
        written = visit.written()
        assert not written, f"round {visit.round}, client {visit.client}: {', '.join(written)} was written to"
    for round_, (server, seen) in enumerate(zip(run.servers, run.seen, strict=True)):
        assert digest(server) == seen, f"the server's state of round {round_} was written to"


def test_predicting_writes_nothing(subject: Subject) -> None:
    """Predicting and evaluating change no state, no message and no parts; every client names the same predictors.

    Catches evaluation in training mode, which moves BatchNorm's statistics, and predictors that only some clients
    have. A client that never trained predicts too.
    """
    run = subject.run()
    federation, server, place = run.federation, run.servers[-1], run.driver.placement
    algorithm = federation.algorithm
    names: set[tuple[str, ...]] = set()
    was = digest(server), {client: digest(state) for client, state in run.privates.items()}
    with place.defaults(), torch.no_grad():
        for client, trained in run.privates.items():
            local = federation.local(client, 3)
            x, _ = federation.data.test(client).batch(torch.arange(2), dtype=place.dtype)
            for private in (trained, algorithm.init_client(federation.local(client, 0))):
                received = algorithm.message_for(server, local.info)
                parts = drive(algorithm.predictor_parts(private, received, local), run.driver.perform)
                before = digest(private), digest(received), digest(parts)
                for model in local.models.values():
                    model.train(False)
                logits = algorithm.predict(bind(local.models, parts), x)
                assert (digest(private), digest(received), digest(parts)) == before, f"client {client} wrote"
                names.add(tuple(logits))
                for name, value in logits.items():
                    assert value.shape == (2, federation.task.num_classes), f"{name} gives {tuple(value.shape)}"
        _evaluated(run)
    assert len(names) == 1, f"clients name different predictors: {names}"
    assert was == (digest(server), {client: digest(run.clients.private(client)) for client in run.privates})


#: The chains of operations that have worked as ONNX.
_CHAINS = set[str]()


def _chain(file: Path) -> str:
    """The operations of a pt2 file with their arguments and types, of weights of any name and size."""
    nodes = list(torch.export.load(file).graph.nodes)
    places = {node: f"%{place}" for place, node in enumerate(nodes)}
    return repr(
        [
            (
                str(node.target) if node.op == "call_function" else node.op,
                map_arg((node.args, node.kwargs), places.get),
                getattr(node.meta.get("val"), "dtype", None),
            )
            for node in nodes
        ]
    )


def test_trained_models_say_what_the_trainer_says(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory makes every predictor without the data, and exports of them say the same within 1e-5.

    The same as the objects that trained. The exports are pt2, and ONNX where its packages are installed, read back by a
    process without polyfed; as ONNX, which takes seconds, each chain of operations until it has worked once. Catches
    predictors that read what training left on the algorithm, parts that no module can hold, and operations that no
    exporter knows.
    """
    config = subject.config({"run": {"rounds": 2, "eval_every": 2, "workers": 1}}).resolved()
    federation, place = prepare(config), Placement.of("cpu", "fp32")

    def prepared(*_: object) -> Federation:
        return federation

    # Training happens on these very objects; what is loaded from the run directory makes its own.
    monkeypatch.setattr("polyfed.simulation.simulate.prepare", prepared)
    simulate(config, out=tmp_path / "run")
    data, cases, expected, chains = federation.data, list[tuple[Path, dict[str, Any]]](), list[Tensor](), set[str]()
    works = make_driver("sequential", "fp32")
    scorer = Scorer(federation.algorithm, place, works.costs, federation.config)
    forms: list[Format] = ["pt2"]
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        forms.append("onnx")

    def check(model: TrainedModel, rows: ClientData, outputs: Tensor, *, exported: bool) -> None:
        given = model.preparation.of_rows(federation.dataset.x[rows.rows])
        exact = outputs.double()
        says = exact.softmax(1) if model.classes else torch.from_numpy(scorer.predictions(outputs, rows.labels).scores)
        gap = float((model(*given) - says).abs().max())
        assert gap <= 1e-5, f"{model.about} {model.predictor} is {gap:.1e} off"
        for form in forms if exported else ():
            if form == "onnx":
                chain = _chain(cases[-1][0])
                if chain in _CHAINS | chains:
                    continue
                chains.add(chain)
            file = tmp_path / f"{len(cases)}.{form}"
            export(model, file, form)
            cases.append((file, {each.name: value.numpy() for each, value in zip(model.inputs, given, strict=True)}))
            expected.append(says)

    with closing(SavedRun(tmp_path / "run", federation.algorithm.states)) as saved:
        server = saved.server
        for client in (0, 1):
            local = federation.local(client, saved.round)
            private = federation.private(client, saved.private(client))
            received = federation.algorithm.message_for(server, local.info)
            parts = drive(federation.algorithm.predictor_parts(private, received, local), works.perform)
            outputs, _ = scorer.outputs(bind(local.models, parts), data.test(client), place)
            for name, found in outputs.items():
                model = trained_model(tmp_path / "run", client, predictor=name)
                check(model, data.test(client), found, exported=client == 0)
        for name, nets in federation.algorithm.global_nets(server, federation.task).items():
            rows = data.global_test([0, 1])[0]
            outputs, _ = scorer.outputs(nets, rows, place)
            check(trained_model(tmp_path / "run", predictor=name), rows, next(iter(outputs.values())), exported=False)
    for (file, _), (output, about), says in zip(cases, read_back(cases, tmp_path), expected, strict=True):
        gap = float((torch.from_numpy(output) - says).abs().max())
        assert gap <= 1e-5, f"{about['predictor']} as {file.suffix} is {gap:.1e} off"
    _CHAINS.update(chains)


def test_bystanders_keep_their_state(subject: Subject) -> None:
    """A client's private state changes only in a round in which it trains.

    Catches private tensors that several clients share, and clients that are written to while others train.
    """
    federation = subject.federation({"clients": {"participation": 0.5}})
    driver = make_driver("sequential", "fp32")
    clients, everyone = here(LocalClients)(federation, driver), range(federation.config.clients.count)
    server: State = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    for round_ in (1, 2, 3):
        before = {client: digest(clients.private(client)) for client in everyone}
        played = play_round(federation, server, draw_cohort(federation, round_), clients, driver)
        clients.commit()
        server = played.server
        for client in before.keys() - {info.id for info in played.cohort}:
            assert digest(clients.private(client)) == before[client], f"client {client}, round {round_}"


class _KilledError(BaseException):
    """As if the process were killed: no `except Exception` sees it."""


class _Killer(Quiet):
    def round_ended(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 3:
            raise _KilledError


def test_resumed_run_is_the_same_run(subject: Subject, tmp_path: Path) -> None:
    """Four rounds are bitwise two, one more that is lost, new objects, and two from the checkpoint.

    Catches state that is in no checkpoint: on ``self``, in a generator, in the order of a mapping.
    """
    often = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2}
    config = subject.config({"run": often, "clients": {"participation": 0.5}})
    simulate(config, out=tmp_path / "straight")
    with pytest.raises(_KilledError):
        simulate(config, out=tmp_path / "killed", callbacks=[_Killer()])
    resume(tmp_path / "killed")
    names = {
        path.relative_to(tmp_path / "straight")
        for pattern in ("rounds.jsonl", "clients.jsonl", "summary.json", "states/*/*", "checkpoint/*.safetensors")
        for path in (tmp_path / "straight").glob(pattern)
    }
    assert len(names) >= 4
    for name in sorted(names):
        left, right = ((tmp_path / folder / name).read_bytes() for folder in ("straight", "killed"))
        if name.suffix == ".safetensors":
            assert left == right, f"{name} differs"
        else:
            assert _timeless(left, name.suffix) == _timeless(right, name.suffix), f"{name} differs"


def _timeless(data: bytes, suffix: str) -> Any:
    """JSON, or lines of it, without what the clock and the machine say."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            skip = ("seconds", "memory", "run_dir")
            return {key: strip(item) for key, item in value.items() if not str(key).startswith(skip)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip([json.loads(line) for line in data.splitlines()] if suffix == ".jsonl" else json.loads(data))


# -------------------------------------------------------------------------------------------------------- server


def _alike(subject: Subject) -> list[ClientInfo]:
    """The clients with the first one's network and capacity: each could have sent what another did."""
    federation = subject.run().federation
    infos = [federation.info(client) for client in range(federation.config.clients.count)]
    return [info for info in infos if replace(info, id=0) == replace(infos[0], id=0)]


def _sent(subject: Subject) -> list[list[Message]]:
    """What the clients that are alike sent in round 2, exchange by exchange; empty if nothing travels."""
    visits = [visit for visit in subject.run().clients.visits if visit.round == 2]
    ups = [[visit.up for visit in visits if visit.client == info.id] for info in _alike(subject)]
    return [[up for up in of_one if up is not None] for of_one in ups if None not in of_one]


def _aggregate(subject: Subject, answers: Sequence[tuple[ClientInfo, list[Message]]]) -> State:
    """The server's state after a round 2 in which these clients gave these answers."""
    run = subject.run()
    works, rng = make_driver("sequential", "fp64"), run.federation.rng.at("round", 2, "server")
    cohort = Cohort(tuple(info for info, _ in answers), 2, run.federation.config.run.rounds, rng)
    turn = iter(range(len(answers[0][1])))

    def perform(request: Any) -> Any:
        if not isinstance(request, Exchange):
            return works.perform(request)
        now, algorithm = next(turn), run.federation.algorithm
        with Gathering(request.gather, algorithm.messages) as gathering:
            for info, of_one in answers:
                gathering.put(info, of_one[now])
            return gathering.settle([info.id for info, _ in answers], {})

    with works.placement.defaults():
        return drive(run.federation.algorithm.server_round(run.servers[1], cohort), perform)


def test_equal_answers_count_once(subject: Subject) -> None:
    """Three clients with one and the same answer lead the server to where one of them leads it.

    Catches sums that are not divided, and means divided by the wrong number.
    """
    infos, sent = _alike(subject), _sent(subject)
    if sent:
        one = _aggregate(subject, [(infos[0], sent[0])])
        three = _aggregate(subject, [(info, sent[0]) for info in infos[:3]])
        near(three, one, per_client=False)


def test_order_of_the_answers_does_not_matter(subject: Subject) -> None:
    """Who gave which answer, and who is listed first, does not matter to what the server shares.

    Catches the average that is the last client's model (one state dict accumulated under two names), and streaming
    means with wrong weights. Where answers change hands, what a server keeps per client (mappings by number) is left
    out.
    """
    infos, sent = _alike(subject), _sent(subject)
    if sent:
        plain = _aggregate(subject, list(zip(infos, sent, strict=True)))
        listed = _aggregate(subject, list(zip(infos[::-1], sent[::-1], strict=True)))
        near(listed, plain, "listed in another order, ")
        handed = _aggregate(subject, list(zip(infos, [*sent[1:], sent[0]], strict=True)))
        near(handed, plain, "with answers changing hands, ", per_client=False)


def test_examples_weigh(subject: Subject) -> None:
    """An answer that stands for three examples weighs as much as three answers that stand for one each.

    For uploads with a field ``num_examples``. Catches means that forget it, or weigh by the wrong client's number.
    """
    infos, sent = _alike(subject), _sent(subject)
    if not sent or not all(hasattr(message, "num_examples") for of_one in sent for message in of_one):
        return

    def standing_for(examples: int, answer: list[Message]) -> list[Message]:
        return [replace(message, num_examples=examples) for message in answer]  # pyright: ignore[reportCallIssue]

    a, b = sent[:2]
    more = [replace(infos[0], id=infos[-1].id + i) for i in (1, 2)]
    heavy = _aggregate(subject, [(infos[0], standing_for(1, a)), (infos[1], standing_for(3, b))])
    light = _aggregate(
        subject, [(infos[0], standing_for(1, a)), *((info, standing_for(1, b)) for info in (infos[1], *more))]
    )
    near(heavy, light, per_client=False)


def test_labels_are_weighed(subject: Subject) -> None:
    """``train.class_weights`` and ``train.label_smoothing`` count, and only the ratios of the weights do.

    Catches supervised losses that are given labels in place of the client's batch and so ignore the settings, and
    weighted sums where a weighted mean is meant. A method that learns from no label declares itself exempt.
    """
    plain = subject.run()

    def trained(run: Run[Watched]) -> dict[ClientId, Any]:
        return {visit.client: (visit.trained, visit.up) for visit in run.clients.visits if visit.round == 1}

    for keys in ({"class_weights": "balanced"}, {"label_smoothing": 0.2}):
        weighed = trained(play(subject.federation({"train": keys}), here(Watched), rounds=1, precision="fp64"))
        same_as_before = [client for client, found in trained(plain).items() if not differences(found, weighed[client])]
        assert not same_as_before, (
            f"client {same_as_before[0]} learns the same with {keys}: give its batch to cross_entropy and task_loss, "
            "not the labels alone"
        )
    twice = {"class_weights": [2.0] * plain.federation.task.num_classes}
    close(play(subject.federation({"train": twice}), here(Watched), precision="fp64"), plain)


def test_idle_rounds_change_nothing(subject: Subject) -> None:
    """Where no client's training moves anything, nothing that the server shares moves either (to 1e-9).

    Catches coordinates that nobody holds being set to zero, masked values averaged as zeros, and means that shrink. A
    method whose uploads are no weights (prototypes, logits) or whose server trains declares itself exempt.
    """
    run = play(subject.federation(), here(LocalClients), rounds=1, driver="idle", precision="fp64")
    near(run.servers[1], run.servers[0], per_client=False)


def test_numbers_do_not_depend_on_how_many_rounds_follow(subject: Subject) -> None:
    """Three rounds lead to the same states, however many rounds the run is to have.

    Catches a schedule over `Task.rounds` or ``Cohort.rounds`` that is not declared by ``uses_rounds = True``: such a
    run could go on after its end, with the numbers of no run.
    """
    if subject.cls.uses_rounds:
        return
    same(play(subject.federation({"run": {"rounds": 50}}), here(LocalClients)), subject.run("sequential", "fp32"))


def test_broadcast_does_not_depend_on_the_id(subject: Subject) -> None:
    """What a client receives in order to predict depends on its network and capacity alone.

    Catches a ``personal_message`` that is not declared: evaluation sends one message to all clients of a kind.
    """
    run = subject.run()
    if run.federation.algorithm.personal_message:
        return
    for client in run.privates:
        info = run.federation.info(client)
        mine, theirs = (
            run.federation.algorithm.message_for(run.servers[-1], k) for k in (info, replace(info, id=client + 1))
        )
        assert not differences(mine, theirs), f"client {client} under another number; set personal_message = True"


# ------------------------------------------------------------------------------------------------------ learning


def test_learns(subject: Subject) -> None:
    """On a small problem, seeded, clients end 0.2 above chance and 0.1 above where they began; errors fall by a fifth.

    Catches gradients that do not arrive, steps uphill, updates that are lost on the way, and a forgotten `yield from`.
    """
    federation = subject.learning()
    rounds, chance = federation.config.run.rounds, 1 / federation.task.num_classes
    ends = (_evaluated(play(federation, here(LocalClients), rounds=count)) for count in (0, rounds))
    metric = federation.config.metrics[0]
    before, after = (end.mean(metric=metric) or 0.0 for end in ends)
    if federation.task.kind == "regression":
        assert after <= 0.8 * before, f"{metric} {after:.3f} after {rounds} rounds; {before:.3f} before the first"
        return
    assert after >= chance + 0.2, f"accuracy {after:.3f} after {rounds} rounds; chance is {chance:.3f}"
    assert after >= before + 0.1, f"accuracy {after:.3f} after {rounds} rounds; {before:.3f} before the first"


@BOTH
def test_divergence_is_named(subject: Subject, driver: str) -> None:
    """A step so large that numbers overflow ends the round with an error that names client and round.

    Catches NaN that goes on into the average, and from there to everyone.
    """
    federation = subject.federation({"train": {"epochs": None, "steps": 4, "lr": 1e30}})
    with pytest.raises(DivergedError, match=r"client \d+, round 1\b"):
        play(federation, here(LocalClients), rounds=1, driver=driver)
