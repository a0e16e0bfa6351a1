"""The costs and metrics of a run so far: the numbers of summary.json, updated in each round."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeAlias, cast

from polyfed.base import files
from polyfed.config.sections import RunSection
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Size
from polyfed.metrics.catalogue import METRICS, aim, beyond_accuracy, reaches
from polyfed.metrics.metrics import by_class, value
from polyfed.rounds.evaluation import Evaluation, mean_of, worst_of
from polyfed.rounds.federation import ServerView
from polyfed.rounds.round import Played
from polyfed.rounds.timing import REASONS, Timing, Wasted

#: What the tests at the end of a run found: "last", and "best" where it is kept -> the round and the scores.
Tests: TypeAlias = dict[str, tuple[int, Evaluation]]

#: The sums that an evaluation changes.
_EVALUATED = (
    "bytes",
    "flops_evaluation",
    "flops_per_example",
    "seconds_evaluation",
    "targets",
    "best",
    "last",
    "metrics",
)

#: The keys of a line that an evaluation adds, by log.
_OF_AN_EVALUATION = {
    "rounds.jsonl": ("accuracy", "metrics", "evaluation_down", "seconds_evaluation", "gradient_squared"),
    "clients.jsonl": ("examples", "correct", "accuracy", "metrics", "by_class", "majority"),
}


class Ledger:
    """Sums over rounds. `progress` holds the whole ledger, as JSON, for the checkpoint."""

    def __init__(self, view: ServerView, progress: dict[str, Any] | None = None) -> None:
        self.view = view
        self.progress: dict[str, Any] = _known(progress) or {
            "bytes": {"up": _size(Size()), "down": _size(Size()), "evaluation_down": 0},
            "flops": 0,
            "participations": 0,
            "flops_evaluation": 0,
            "flops_per_example": 0.0,
            "seconds": 0.0,
            "seconds_evaluation": 0.0,
            "by_model": {},
            "targets": [None for _ in view.config.run.targets],
            "best": None,
            "last": None,
        }
        if view.config.run.selects:
            self.progress.setdefault(
                "selection", {"best": None, "last": None, "reference": None, "waited": 0, "stopped": None}
            )
        if view.config.devices is not None:
            clock = {"seconds": 0.0, "void": 0, "failed": dict.fromkeys(REASONS, 0), "wasted": _wasted()}
            self.progress.setdefault("simulated", clock)

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning of the run; 0 without devices."""
        return self.progress["simulated"]["seconds"] if "simulated" in self.progress else 0.0

    @property
    def best_round(self) -> int | None:
        """The round whose validation metric is the best so far; None if there is none, or no round is chosen."""
        best = self.progress.get("selection", {}).get("best")
        return None if best is None else best["round"]

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The round at which ``run.patience`` ended the run, and why; None if it did not."""
        return self.progress.get("selection", {}).get("stopped")

    def reopen(self) -> None:
        """Take back what only the last round of a run does: the run goes on, and was not at its end."""
        self.progress.pop("majority", None)
        self.progress |= self.progress.pop("onward", {})

    def round(self, played: Played, seconds: float) -> dict[str, Any]:
        """Enter a round's training; return the training half of its line in rounds.jsonl."""
        reports = played.reports.values()
        up, down = sum((r.up for r in reports), Size()), sum((r.down for r in reports), Size())
        flops = sum(r.work.flops for r in reports)
        p = self.progress
        p["bytes"]["up"], p["bytes"]["down"] = _plus(p["bytes"]["up"], up), _plus(p["bytes"]["down"], down)
        p["flops"] += flops
        p["seconds"] += seconds
        p["participations"] += len(reports)
        for client, report in played.reports.items():
            family = p["by_model"].setdefault(
                self.view.info(client).architecture,
                {"bytes_up": 0, "bytes_down": 0, "flops": 0, "seconds": 0.0, "step_peak": 0},
            )
            family["bytes_up"] += report.up.total
            family["bytes_down"] += report.down.total
            family["flops"] += report.work.flops
            family["seconds"] += report.work.seconds
            family["step_peak"] = max(family["step_peak"], report.work.peak_bytes)
        losses = [r.work.loss for r in reports if r.work.loss is not None]
        return {
            "cohort": [client.id for client in played.cohort],
            "loss": sum(losses) / len(losses) if losses else None,
            "bytes": {"up": up.total, "down": down.total},
            "flops": flops,
            "seconds": seconds,
            **({} if played.timing is None else self._simulated(played, played.timing)),
        }

    def _simulated(self, played: Played, timing: Timing) -> dict[str, Any]:
        """Enter a round of the simulated clock."""
        p = self.progress["simulated"]
        failed = {client: loss.reason for client, loss in timing.losses.items() if client not in played.reports}
        wasted = _wasted(*timing.losses.values())
        p["seconds"] += timing.seconds
        p["void"] += timing.void
        p["failed"] = {reason: n + list(failed.values()).count(reason) for reason, n in p["failed"].items()}
        p["wasted"] = {kind: n + wasted[kind] for kind, n in p["wasted"].items()}
        return {
            "replies": len(played.reports),
            "simulated": {
                "seconds": timing.seconds,
                "hour": timing.hour,
                "failed": {str(client): reason for client, reason in sorted(failed.items())},
                "wasted": wasted,
            },
            **({"void": True} if timing.void else {}),
        }

    def evaluation(self, round_: int, found: Evaluation) -> dict[str, Any]:
        """Enter an evaluation; return the half of the round's line that is about metrics."""
        p, run = self.progress, self.view.config.run
        if round_ % run.eval_every:  # a longer run would not evaluate this round: `reopen`
            p["onward"] = deepcopy({key: p[key] for key in _EVALUATED if key in p})
        p["bytes"]["evaluation_down"] += found.down
        p["flops_evaluation"] += found.flops
        p["flops_per_example"] = found.flops_per_example
        p["seconds_evaluation"] += found.seconds
        for i, (name, target) in enumerate(map(aim, self.view.config.run.targets)):
            mean = found.mean(metric=name)
            if p["targets"][i] is None and mean is not None and reaches(name, mean, target):
                p["targets"][i] = {name: target, "round": round_, **self.totals()}
        if self.view.config.data.task == "classification":
            p["last"] = self._block(found, "accuracy")
            p["best"] = _better("accuracy", p["best"], p["last"]["mean"], round_)
        if any(score.majority for score in found.scores.values()):
            p["majority"] = {name: _majority(found, name) for name in self.view.config.metrics}
        best = p.get("metrics", {})
        if more := {name: self._more(found, name) for name in beyond_accuracy(self.view.config.metrics)}:
            p["metrics"] = {
                name: {**block, "best": _better(name, best.get(name, {}).get("best"), block["mean"], round_)}
                for name, block in more.items()
            }
        if run.selects:
            self._select(round_, found)
        return {
            **({} if p["last"] is None else {"accuracy": p["last"]}),
            **({"metrics": more} if more else {}),
            "evaluation_down": found.down,
            "seconds_evaluation": found.seconds,
            **({} if found.gradient is None else {"gradient_squared": found.gradient}),
        }

    def _select(self, round_: int, found: Evaluation) -> None:
        """Note whether this is the best round so far, and whether the run is to end."""
        config, s, metric = self.view.config, self.progress["selection"], self.view.config.monitor
        mean = found.mean(metric=metric)
        s["last"] = {"round": round_, "validation": self._means(found)}
        if mean is not None and (s["best"] is None or better(metric, mean, s["best"]["mean"])):
            s["best"] = {**s["last"], "mean": mean}
        if mean is not None and (s["reference"] is None or better(metric, mean, s["reference"], config.run.min_delta)):
            s["reference"], s["waited"] = mean, 0
            return
        s["waited"] += 1
        if config.run.patience is not None and s["waited"] >= config.run.patience:
            least = f" by more than {config.run.min_delta:g}" if config.run.min_delta else ""
            s["stopped"] = {
                "round": round_,
                "reason": f"{metric} on validation rows did not improve{least} in {s['waited']} evaluations "
                f"(run.patience = {config.run.patience})",
            }

    def _means(self, found: Evaluation) -> dict[str, float | None]:
        return {name: found.mean(metric=name) for name in self.view.config.metrics}

    def _block(self, found: Evaluation, metric: str) -> dict[str, Any]:
        """Return a metric's means over clients."""
        return {
            "mean": found.mean(metric=metric),
            "worst_decile": found.worst_decile(metric),
            "predictors": {name: found.mean(name, metric=metric) for name in found.predictors},
            "by_model": self._by(found, metric, lambda info: info.architecture),
            "by_capacity": self._by(found, metric, lambda info: f"{info.capacity:g}"),
            "before_aggregation": mean_of([score.value(metric) for score in found.before]),
            "global": {name: pooled.value(metric) for name, (pooled, _) in found.whole.items()},
            "global_local": {
                name: mean_of([s.value(metric) for s in local]) for name, (_, local) in found.whole.items()
            },
            "clients": len(found.scores),
        }

    def _more(self, found: Evaluation, metric: str) -> dict[str, Any]:
        """Return `_block`, the clients left out of its mean, and the metric of all rows pooled."""
        classes = by_class(metric, found.pooled, self.view.class_names)
        return {
            **self._block(found, metric),
            "undefined": sum(score.value(metric) is None for score in found.scores.values()),
            "pooled": value(metric, found.pooled),
            **({"pooled_by_class": classes} if classes else {}),
        }

    def _by(self, found: Evaluation, metric: str, kind: Callable[[ClientInfo], str]) -> dict[str, float | None]:
        groups: dict[str, list[int]] = {}
        for client in found.scores:
            groups.setdefault(kind(self.view.info(client)), []).append(client)
        return {name: found.mean(clients=clients, metric=metric) for name, clients in sorted(groups.items())}

    def totals(self) -> dict[str, Any]:
        """Return the bytes, FLOPs and seconds of training so far."""
        p = self.progress
        return {
            "bytes_up": p["bytes"]["up"]["total"],
            "bytes_down": p["bytes"]["down"]["total"],
            "flops": p["flops"],
            "seconds": p["seconds"],
            **({"simulated_seconds": self.now} if "simulated" in p else {}),
        }

    def peaked(self, peak: int) -> None:
        """Enter the largest resident memory of these processes; a resumed run had other processes before."""
        self.progress["peak"] = max(self.progress.get("peak", 0), peak)

    def _tested(self, tests: Tests) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the progress with the tests of the end, and what the summary says of the choice of a round.

        The summary reports the model that the run keeps on rows that chose nothing. The progress itself stays as it is,
        as the run may go on.
        """
        p, config = deepcopy(self.progress), self.view.config
        s = p.pop("selection")
        for found in {id(found): found for _, found in tests.values()}.values():
            p["bytes"]["evaluation_down"] += found.down
            p["flops_evaluation"] += found.flops
            p["seconds_evaluation"] += found.seconds
        p["best"] = p["last"] = None
        p.pop("metrics", None)
        kept = config.run.keep if config.run.keep in tests else "last"  # a metric that no round defined chose none
        if kept in tests:
            found = tests[kept][1]
            p["last"] = self._block(found, "accuracy") if config.data.task == "classification" else None
            if more := {name: self._more(found, name) for name in beyond_accuracy(config.metrics)}:
                p["metrics"] = more
            p["majority"] = {name: _majority(found, name) for name in config.metrics}
            p["flops_per_example"] = found.flops_per_example
        kinds = ("best", "last") if config.run.keep == "best" else ("last",)
        return p, {
            "metric": config.monitor,
            "kept": kept,
            **({} if kept == config.run.keep else {"asked": config.run.keep}),
            "stopped": s["stopped"],
            **{
                kind: {
                    **{key: s[kind][key] for key in ("round", "validation")},
                    "test": self._means(tests[kind][1]) if kind in tests else None,
                }
                for kind in kinds
                if s[kind] is not None
            },
        }

    def summary(self, run_dir: str, trained: int, partition_hash: str, tests: Tests | None = None) -> dict[str, Any]:
        """The content of summary.json; docs/run-directory.md explains each key.

        Args:
            run_dir: the run directory.
            trained: number of clients that trained.
            partition_hash: the hash of the partition.
            tests: the scores on test rows, if validation rows chose a round; see `RoundLoop.tests`.
        """
        config = self.view.config
        progress, selection = self._tested(tests or {}) if config.run.selects else (self.progress, None)
        p = files.nulled(progress)
        up, down = p["bytes"]["up"], p["bytes"]["down"]
        return {
            "algorithm": self.view.algorithm.name,
            "name": config.run.name,
            "seed": config.run.seed,
            "rounds": config.run.rounds,
            "run_dir": run_dir,
            **({} if config.data.task == "regression" else {"accuracy": {**(p["last"] or {}), "best": p["best"]}}),
            **{key: p[key] for key in ("metrics", "majority") if key in p},
            **({} if selection is None else {"selection": files.nulled(selection)}),
            "bytes": {
                "up": up["total"],
                "down": down["total"],
                **{f"up_{kind}": up[kind] for kind in ("values", "indices", "header")},
                **{f"down_{kind}": down[kind] for kind in ("values", "indices", "header")},
                "evaluation_down": p["bytes"]["evaluation_down"],
            },
            **{key: p[key] for key in ("flops", "flops_evaluation", "flops_per_example")},
            **{key: p[key] for key in ("seconds", "seconds_evaluation")},
            "memory": {
                "process_peak": p.get("peak", 0),
                "step_peak": {name: family["step_peak"] for name, family in p["by_model"].items()},
            },
            "by_model": p["by_model"],
            "targets": p["targets"],
            **({"simulated": p["simulated"]} if "simulated" in p else {}),
            "clients": {"count": config.clients.count, "trained": trained, "participations": p["participations"]},
            "partition_hash": partition_hash,
            "config_hash": config.hash(),
        }


def longer(log: str, row: dict[str, Any], before: int, run: RunSection) -> dict[str, Any] | None:
    """Return a line of a log as a run of ``run.rounds`` rounds would have written it.

    Args:
        log: the name of the log.
        row: the line, of a run with the same configuration but for the number of rounds.
        before: the number of rounds of that run, whose last round was evaluated in any case.
        run: the section of the longer run.
    """
    row = dict(row)
    if "rounds" in row:
        row["rounds"] = run.rounds
    if row["round"] == before:
        off_schedule = before % run.eval_every > 0
        gone = _OF_AN_EVALUATION[log] if off_schedule else ("majority",)
        row = {key: value for key, value in row.items() if key not in gone}
        if log == "clients.jsonl" and off_schedule and not {"steps", "simulated_seconds"} & row.keys():
            return None  # it did not train
    return row


def client_rows(view: ServerView, round_: int, played: Played | None, found: Evaluation | None) -> list[dict[str, Any]]:
    """Return the lines of clients.jsonl for a round: which clients trained, counted or not, and the test results."""
    trained = played.reports if played else {}
    timing = played.timing if played else None
    lost = timing.losses if timing else {}
    tested = found.scores if found else {}
    rows: list[dict[str, Any]] = []
    for client in sorted({*trained, *lost, *tested}):
        info = view.info(client)
        row: dict[str, Any] = {"round": round_, "client": client, "model": info.architecture, "capacity": info.capacity}
        if view.client_names:
            row["name"] = view.client_names[client]
        if client in trained:
            report = trained[client]
            row |= {
                "steps": report.work.steps,
                "execution": report.work.execution,
                "loss": report.work.loss,
                "bytes_up": report.up.total,
                "bytes_down": report.down.total,
                "flops": report.work.flops,
                "seconds": report.work.seconds,
                "step_peak": report.work.peak_bytes,
            }
        if timing and (client in lost or client in trained):
            loss = lost.get(client)
            row |= {
                "simulated_seconds": timing.clients.get(client, 0.0) + (loss.seconds if loss else 0.0),
                **({"failed": loss.reason, "wasted": _wasted(loss)} if loss else {}),
            }
        if client in tested:
            score = tested[client]
            row["examples"] = score.examples
            if score.correct:
                row |= {"correct": score.correct, "accuracy": score.accuracy()}
            if score.values:
                row["metrics"] = score.values[score.predictors[0]]
                parts = {name: by_class(name, score.tallies, view.class_names) for name in row["metrics"]}
                if any(parts.values()):
                    row["by_class"] = {name: part for name, part in parts.items() if part}
            if score.majority:
                row["majority"] = score.majority
        rows.append(row)
    return rows


def _majority(found: Evaluation, metric: str) -> dict[str, float | None]:
    """Return a metric of the clients that each predict their most frequent class: the mean, and the worst tenth."""
    values = [score.majority[metric] for score in found.scores.values() if score.majority]
    return {"mean": mean_of(values), "worst_decile": worst_of(metric, values)}


def better(metric: str, value: float, than: float, by: float = 0.0) -> bool:
    """Return whether a value of a metric is better than another by more than ``by``."""
    return value - than > by if METRICS[metric].higher else than - value > by


def _better(metric: str, best: dict[str, Any] | None, mean: float | None, round_: int) -> dict[str, Any] | None:
    """Return the best mean so far, and its round."""
    if mean is None or (best is not None and (reaches(metric, best["mean"], mean))):
        return best
    return {"mean": mean, "round": round_}


def _size(size: Size) -> dict[str, int]:
    return {"values": size.values, "indices": size.indices, "header": size.header, "total": size.total}


def _known(progress: Any) -> Any:
    """Return the ledger of a checkpoint, in which unknown FLOPs are null, with NaN in their place."""
    if not isinstance(progress, dict):
        return progress
    entries = cast("dict[str, Any]", progress).items()
    return {k: math.nan if v is None and k.startswith("flops") else _known(v) for k, v in entries}


def _plus(sums: dict[str, int], size: Size) -> dict[str, int]:
    return {kind: sums[kind] + more for kind, more in _size(size).items()}


def _wasted(*losses: Wasted) -> dict[str, int]:
    return {kind: sum(getattr(loss, kind) for loss in losses) for kind in ("bytes_up", "bytes_down", "flops")}
