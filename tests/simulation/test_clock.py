"""Simulated time by hand: how long a round lasts, who is lost, what that leaves behind, and that nothing else moves."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import running

from polyfed.algorithms.fedavg import FedAvg
from polyfed.base.errors import ConfigError
from polyfed.config import Config
from polyfed.config.profiles import Profile
from polyfed.core.clients import Cohort
from polyfed.core.message import Size
from polyfed.core.requests import Exchange
from polyfed.execute.drivers import Work, make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.timing import REASONS
from polyfed.rounds.unit import Report
from polyfed.simulation.clock import TimedClients, done, ended
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

HEAD = "device,compute_gflops,memory_mb,down_mbps,up_mbps"


def table(tmp_path: Path, *rows: str, head: str = HEAD) -> str:
    path = tmp_path / "devices.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


def config(**more: Any) -> Config:
    """FedMRL on four clients, who all take part."""
    return running.config(**{"clients": {"participation": 1.0}, **more})


@pytest.mark.parametrize(
    ("arrivals", "silent", "rules", "seconds", "lost"),
    [
        ({1: 3.0, 2: 5.0}, [], {}, 5.0, {}),
        ({}, [], {}, 0.0, {}),
        ({1: 3.0}, [], {"told": 4.0}, 4.0, {}),
        ({1: 3.0, 2: 5.0}, [], {"deadline": 5.0}, 5.0, {}),
        ({1: 3.0, 2: 5.0}, [], {"deadline": 4.0}, 4.0, {2: "late"}),
        ({1: 3.0, 2: 5.0}, [3], {"deadline": 9.0}, 9.0, {}),
        ({1: 3.0}, [], {"told": 14.0, "deadline": 9.0}, 9.0, {}),
        ({1: 3.0, 2: 5.0, 3: 4.0}, [], {"enough": 2}, 4.0, {2: "surplus"}),
        ({1: 3.0, 2: 3.0, 3: 3.0}, [], {"enough": 2}, 3.0, {3: "surplus"}),
        ({1: 3.0, 2: 5.0, 3: 40.0}, [4], {"enough": 2, "deadline": 9.0}, 5.0, {3: "surplus"}),
        ({1: 9.0, 2: 9.0}, [], {"enough": 1, "deadline": 9.0}, 9.0, {2: "surplus"}),
        ({1: 3.0, 2: 5.0, 3: 40.0}, [4], {"enough": 3, "deadline": 9.0}, 9.0, {3: "late"}),
    ],
)
def test_when_an_exchange_ends(arrivals: Any, silent: Any, rules: Any, seconds: float, lost: Any) -> None:
    assert ended(arrivals, silent, **rules) == (seconds, lost)


def test_what_is_done_until_a_moment() -> None:
    """Catches legs that overlap, and a client that has sent before it has computed."""
    profile = Profile("x", compute_gflops=2.0, memory_mb=1, down_mbps=8.0, up_mbps=4.0)
    report = Report(Work(flops=6 * 10**9), Size(values=10**6), Size(values=10**6))  # 1 s, 3 s, 2 s
    assert sum(profile.seconds(10**6, 6 * 10**9, 10**6)) == pytest.approx(6.0)
    found = [done(profile, report, until) for until in (0.5, 2.5, 5.0, 6.0, 60.0)]
    assert [(loss.bytes_down, loss.flops, loss.bytes_up) for loss in found] == [
        (500_000, 0, 0),
        (10**6, 3 * 10**9, 0),
        (10**6, 6 * 10**9, 500_000),
        (10**6, 6 * 10**9, 10**6),
        (10**6, 6 * 10**9, 10**6),
    ]
    assert [loss.seconds for loss in found] == pytest.approx([0.5, 2.5, 5.0, 6.0, 6.0])
    nothing = done(profile, Report(Work(flops=10**9), Size(), Size()), 0.1)  # Standalone: no messages, no legs
    assert (nothing.bytes_down, nothing.flops, nothing.bytes_up) == (0, 2 * 10**8, 0)


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    """Catches another formula, a clock that starts again, and targets that do not know the time."""
    profiles = table(tmp_path, "fast,10,1000,80,40", "slow,1,1000,8,4")
    settings = config(run={"targets": [0.0001]}, devices={"profiles": profiles, "deal": "in-turn"})
    summary = simulate(settings, out=tmp_path / "run").summary
    rounds = running.lines(tmp_path / "run/rounds.jsonl")
    rows = [row for row in running.lines(tmp_path / "run/clients.jsonl") if "steps" in row]
    now = 0.0
    for row in rounds[1:]:
        mine = [r for r in rows if r["round"] == row["round"]]
        for r in mine:
            factor = 1 if r["client"] % 2 == 0 else 10
            legs = r["bytes_down"] * 8 / 80e6, r["flops"] / 10e9, r["bytes_up"] * 8 / 40e6
            assert r["simulated_seconds"] == pytest.approx(factor * sum(legs), rel=1e-12)
        assert row["simulated"]["seconds"] == max(r["simulated_seconds"] for r in mine)
        assert row["simulated"]["failed"] == {}
        assert row["replies"] == 4
        now += row["simulated"]["seconds"]
        assert row["totals"]["simulated_seconds"] == now
    assert summary["simulated"] == {
        "seconds": now,
        "void": 0,
        "failed": dict.fromkeys(REASONS, 0),
        "wasted": {"bytes_up": 0, "bytes_down": 0, "flops": 0},
    }
    target = summary["targets"][0]
    assert target["simulated_seconds"] == rounds[target["round"]]["totals"]["simulated_seconds"]


def test_devices_alone_change_no_number(tmp_path: Path) -> None:
    """Catches a clock that moves a random draw, a weight or a count: with nobody lost the run is the same one."""
    always = table(tmp_path, "x,1,1000,1,1")
    simulate(config(), out=tmp_path / "plain")
    simulate(config(devices={"profiles": always}), out=tmp_path / "timed")
    plain, timed = running.outcome(tmp_path / "plain"), running.outcome(tmp_path / "timed")
    assert (plain["files"], plain["states"]) == (timed["files"], timed["states"])
    for one, two in zip(plain["rounds"], timed["rounds"], strict=True):
        two["totals"].pop("simulated_seconds")
        assert one == {key: value for key, value in two.items() if key not in ("simulated", "replies")}


LOSSES: dict[str, Any] = {
    "run": {"rounds": 6, "eval_every": 3, "checkpoint_every": 2, "targets": [0.05]},
    "clients": {"count": 10, "participation": 0.5, "selection": "available"},
    "devices": {"start_hour": 23.99, "dropout": 0.2, "deadline": 30.0, "oversample": 0.3, "min_replies": 2},
}


def test_every_driver_has_the_same_clock(tmp_path: Path) -> None:
    """Catches time that depends on how clients were executed."""
    found: dict[str, Any] = {}
    for driver in ("sequential", "batched", "auto"):
        settings = running.config(**{**LOSSES, "run": {**LOSSES["run"], "driver": driver}})
        simulate(settings, out=tmp_path / driver)
        keys = ("cohort", "replies", "void", "simulated", "bytes", "flops")
        found[driver] = [
            {key: row.get(key) for key in keys} for row in running.lines(tmp_path / driver / "rounds.jsonl")
        ]
    assert found["batched"] == found["sequential"]
    assert found["auto"] == found["sequential"]
    reasons = {reason for row in found["auto"][1:] for reason in row["simulated"]["failed"].values()}
    assert reasons >= {"dropped", "surplus"}


class Stop(Quiet):
    """Ctrl-C after a round."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_at_the_same_second(tmp_path: Path) -> None:
    simulate(running.config(**LOSSES), out=tmp_path / "straight")
    with pytest.raises(Interrupted):
        simulate(running.config(**LOSSES), out=tmp_path / "stopped", callbacks=[Stop()])
    assert running.lines(tmp_path / "stopped/rounds.jsonl")[-1]["round"] == 3
    resume(tmp_path / "stopped")
    running.same(tmp_path / "stopped", tmp_path / "straight")
    assert running.lines(tmp_path / "straight/rounds.jsonl")[-1]["totals"]["simulated_seconds"] > 0


def test_who_is_late_leaves_nothing_but_its_costs(tmp_path: Path) -> None:
    """Catches a late reply that is averaged, a state that is kept, and costs that vanish."""
    profiles = table(tmp_path, "fast,1000,1000,1000,1000", "slow,1000,1000,0.1,0.1")
    devices = {"profiles": profiles, "deal": "in-turn", "deadline": 1.0}
    settings = config(run={"rounds": 1, "eval_every": 1}, devices=devices)
    summary = simulate(settings, out=tmp_path / "late").summary
    row = running.lines(tmp_path / "late/rounds.jsonl")[1]
    assert row["simulated"]["failed"] == {"1": "late", "3": "late"}
    assert (row["simulated"]["seconds"], row["replies"], row["cohort"]) == (1.0, 2, [0, 1, 2, 3])
    # All four networks are alike, so what the late ones did is what the others did.
    wasted = row["simulated"]["wasted"]
    assert (wasted["bytes_up"], wasted["bytes_down"], wasted["flops"]) == (
        row["bytes"]["up"],
        row["bytes"]["down"],
        row["flops"],
    )
    assert summary["clients"]["trained"] == 2
    lost = [r for r in running.lines(tmp_path / "late/clients.jsonl") if r["round"] == 1 and "failed" in r]
    assert [(r["client"], r["failed"]) for r in lost] == [(1, "late"), (3, "late")]
    assert all("steps" not in r and r["simulated_seconds"] > 1.0 for r in lost)
    # The same as a round of the two others by themselves.
    federation = prepare(config())
    driver = make_driver("sequential", Placement.of("cpu", "fp32"))
    store = Store(tmp_path / "states", federation.algorithm.states, resident=True)
    server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    rng = federation.rng.at("round", 1, "server")
    clients = LocalClients(federation, driver, store)
    cohort = Cohort(tuple(map(federation.info, (0, 2))), 1, settings.run.rounds, rng)
    played: Any = play_round(federation, server, cohort, clients, driver)
    clients.commit()
    assert (tmp_path / "late/checkpoint/server-round-1.safetensors").read_bytes() == state_files.dump(played.server)
    states = {client: data for client, _, _, data in running.rows(tmp_path / "late/states")}
    assert states == {client: state_files.dump(store.get(client)) for client in (0, 2)}


@dataclass(frozen=True, kw_only=True)
class Twice(FedAvg):
    """FedAvg that asks its cohort a second time, with what came of the first."""

    def server_round(self, server: Any, cohort: Cohort) -> Any:
        first = yield from super().server_round(server, cohort)
        return (yield from super().server_round(first, cohort))


def test_a_round_of_two_exchanges_is_as_long_as_both(tmp_path: Path) -> None:
    """Catches a clock that knows the last exchange only, and losses of the first that are forgotten."""
    profiles = table(tmp_path, "fast,1000,1000,1000,1000", "slow,1000,1000,0.01,0.01")
    devices = {"profiles": profiles, "deal": "in-turn", "deadline": 1.0}
    settings = running.config(algorithm={"name": "fedavg"}, clients={"participation": 1.0}, devices=devices)
    federation = replace(prepare(settings), algorithm=Twice())
    driver = make_driver("sequential", Placement.of("cpu", "fp32"))
    store = Store(tmp_path, federation.algorithm.states, resident=True)
    server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    timed = TimedClients(federation, LocalClients(federation, driver, store), print)
    played = timed.play(server, 1, driver, 0.0, score=False)
    assert played.timing is not None
    assert played.timing.seconds == 2.0
    assert sorted(played.reports) == sorted(played.timing.clients) == [0, 2]
    assert sorted(played.timing.losses) == [1, 3]
    assert played.timing.losses[1].bytes_down == played.reports[0].down.total
    assert played.timing.losses[1].flops == played.reports[0].work.flops  # both are of two exchanges


def test_an_exchange_can_be_taken_back(tmp_path: Path) -> None:
    """Catches a second exchange of a round that is lost and takes the state of the first with it."""
    federation = prepare(config())
    driver = make_driver("sequential", Placement.of("cpu", "fp32"))
    clients = LocalClients(federation, driver, Store(tmp_path, federation.algorithm.states, resident=True))
    server: Any = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    infos = tuple(map(federation.info, (0, 1)))
    cohort = Cohort(infos, 1, 4, federation.rng.at("round", 1, "server"))
    down = {info.id: federation.algorithm.message_for(server, info) for info in infos}
    clients.exchange(Exchange(cohort, {0: down[0]}, {}))
    first = clients.private(0)
    clients.exchange(Exchange(cohort, down, {}))
    assert clients.private(0) is not first
    clients.discard([0, 1])
    assert clients.private(0) is first
    clients.discard_round()
    clients.commit()
    assert clients.store.get(0) is None


def test_rounds_that_nobody_answers_are_void_and_the_run_goes_on(tmp_path: Path) -> None:
    """Catches an average of nobody, a state that moves in a void round, and a round without an end."""
    devices = {"profiles": table(tmp_path, "x,1,1000,1,1"), "dropout": 0.97, "deadline": 60.0, "min_replies": 2}
    summary = simulate(config(run={"eval_every": 1}, devices=devices), out=tmp_path / "run").summary
    rounds = running.lines(tmp_path / "run/rounds.jsonl")
    assert all(row["void"] and row["replies"] == 0 and row["loss"] is None for row in rounds[1:])
    assert [row["simulated"]["seconds"] for row in rounds[1:]] == [60.0] * 4
    assert len({row["accuracy"]["mean"] for row in rounds}) == 1
    assert summary["simulated"]["void"] == 4
    assert summary["bytes"]["up"] == summary["flops"] == summary["clients"]["trained"] == 0
    assert summary["simulated"]["wasted"]["bytes_down"] > 0
    assert running.rows(tmp_path / "run/states") == []


def test_who_answered_in_a_void_round_answered_in_vain(tmp_path: Path) -> None:
    profiles = table(tmp_path, "fast,1000,1000,1000,1000", "slow,1000,1000,0.1,0.1")
    devices = {"profiles": profiles, "deal": "in-turn", "deadline": 1.0, "min_replies": 3}
    summary = simulate(config(run={"rounds": 2}, devices=devices), out=tmp_path / "run").summary
    assert summary["simulated"]["failed"] == {**dict.fromkeys(REASONS, 0), "late": 4, "void": 4}
    assert summary["clients"]["trained"] == 0


def test_where_nobody_is_there_the_clock_waits_for_the_next_hour(tmp_path: Path) -> None:
    """Catches a clock that stands still until the rounds are used up."""
    hours = [0, 0, 1, *[0] * 21]
    head = f"{HEAD},{','.join(f'h{hour:02d}' for hour in range(24))}"
    profiles = table(tmp_path, f"x,1,1000,1,1,{','.join(map(str, hours))}", head=head)
    devices = {"profiles": profiles, "start_hour": 0.5}
    for selection, lost in (("available", 0), ("uniform", 8)):
        clients = {"participation": 1.0, "selection": selection}
        summary = simulate(config(clients=clients, devices=devices), out=tmp_path / selection).summary
        rounds = running.lines(tmp_path / selection / "rounds.jsonl")[1:]
        assert [row["simulated"]["seconds"] for row in rounds[:2]] == [1800.0, 3600.0]
        assert [row["simulated"]["hour"] for row in rounds] == [0, 1, 2, 2]
        assert [row.get("void", False) for row in rounds] == [True, True, False, False]
        assert summary["simulated"]["failed"]["absent"] == lost
        assert sum(summary["simulated"]["wasted"].values()) == 0


class Notes(Quiet):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_step_that_a_device_cannot_hold_is_told_once_and_never_counts(tmp_path: Path) -> None:
    profiles = table(tmp_path, "big,1,1000,1,1", "tiny,1,0.01,1,1")
    notes = Notes()
    devices = {"profiles": profiles, "deal": "in-turn"}
    summary = simulate(config(devices=devices), out=tmp_path / "run", callbacks=[notes]).summary
    assert [text for text in notes.said if "tiny" in text] == notes.said
    assert len(notes.said) == 1
    rounds = running.lines(tmp_path / "run/rounds.jsonl")[1:]
    assert all(row["simulated"]["failed"] == {"1": "memory", "3": "memory"} for row in rounds)
    # They received the message, and that is all.
    assert summary["simulated"]["wasted"] == {"bytes_up": 0, "bytes_down": summary["bytes"]["down"], "flops": 0}
    assert summary["clients"]["trained"] == 2


@pytest.mark.parametrize("sent", ["up", "late"])
def test_capacities_follow_the_clock(tmp_path: Path, sent: str) -> None:
    """Catches seconds of other clients, capacities that a resumed run forgets, and late clients that stay large.

    Compute takes no time here, and a slow client's bytes take all; so its time falls with its capacity.
    """
    profiles = table(tmp_path, "fast,1e9,1000,1000,1000", "slow,1e9,1000,0.05,0.05")
    devices = {"profiles": profiles, "deal": "in-turn", **({"deadline": 0.5} if sent == "late" else {})}
    settings = running.config(
        run={"rounds": 5},
        algorithm={"name": "fiarse", "threshold": "adaptive", "deadline": 0.4, "least_capacity": 0.01},
        clients={"participation": 1.0},
        devices=devices,
    )
    simulate(settings, out=tmp_path / "one")
    with pytest.raises(Interrupted):
        simulate(settings, out=tmp_path / "two", callbacks=[Stop()])
    resume(tmp_path / "two")
    running.same(tmp_path / "one", tmp_path / "two")
    rows = [r for r in running.lines(tmp_path / "one/clients.jsonl") if "simulated_seconds" in r]
    slow = [r["simulated_seconds"] for r in rows if r["client"] == 1]
    sizes = [r["bytes_up"] for r in rows if r["client"] == 0]
    assert len(set(sizes)) == 1  # a fast client stays at what it declared
    assert len(slow) == 5
    assert slow[0] > 3 * 0.4
    assert slow[1] == pytest.approx(slow[0] / 2, rel=0.15)  # at most halved: positions and headers do not halve
    assert all(b <= a for a, b in itertools.pairwise(slow))
    assert 0.2 < slow[-1] < 0.5


@pytest.mark.parametrize("sent", ["late", "few"])
def test_capacities_follow_the_clock_in_void_rounds(tmp_path: Path, sent: str) -> None:
    """Catches a run whose clients are too slow at first and stay so: each round would be void, as the one before."""
    rows = ["slow,1e9,1000,0.05,0.05"] if sent == "late" else ["fast,1e9,1000,1000,1000", "slow,1e9,1000,0.05,0.05"]
    settings = running.config(
        run={"rounds": 6},
        algorithm={"name": "fiarse", "threshold": "adaptive", "deadline": 0.4, "least_capacity": 0.01},
        clients={"participation": 1.0},
        devices={"profiles": table(tmp_path, *rows), "deal": "in-turn", "deadline": 0.5, "min_replies": 4},
    )
    summary = simulate(settings, out=tmp_path / "one").summary
    with pytest.raises(Interrupted):
        simulate(settings, out=tmp_path / "two", callbacks=[Stop()])
    resume(tmp_path / "two")
    running.same(tmp_path / "one", tmp_path / "two")
    void = [row.get("void", False) for row in running.lines(tmp_path / "one/rounds.jsonl")[1:]]
    assert void[0]
    assert void == sorted(void, reverse=True)  # from the first round that counts on, all do
    assert 1 <= summary["simulated"]["void"] <= 4
    clients = [r for r in running.lines(tmp_path / "one/clients.jsonl") if r.get("round") == 6 and "steps" in r]
    sizes = {r["client"]: r["bytes_up"] for r in clients}
    assert sizes.keys() == {0, 1, 2, 3}
    assert (sizes[0] == sizes[1]) == (sent == "late")  # a fast client stays at what it declared


def test_a_deadline_needs_a_clock(tmp_path: Path) -> None:
    """Catches a key that does nothing."""
    keys = {"name": "fiarse", "threshold": "adaptive", "deadline": 0.4}
    with pytest.raises(ConfigError, match=r"algorithm\.deadline: got 0\.4 s, but without \[devices\]"):
        simulate(running.config(algorithm=keys), out=tmp_path / "run")
