"""The costs and metrics of a run so far: the numbers of summary.json, updated in each round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from polyfed.base import files
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Size
from polyfed.metrics.catalogue import aim, beyond_accuracy, reaches
from polyfed.metrics.metrics import by_class, value
from polyfed.rounds.evaluation import Evaluation, mean_of, worst_of
from polyfed.rounds.federation import ServerView
from polyfed.rounds.round import Played
from polyfed.rounds.timing import REASONS, Timing, Wasted


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
        if view.config.devices is not None:
            clock = {"seconds": 0.0, "void": 0, "failed": dict.fromkeys(REASONS, 0), "wasted": _wasted()}
            self.progress.setdefault("simulated", clock)

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning of the run; 0 without devices."""
        return self.progress["simulated"]["seconds"] if "simulated" in self.progress else 0.0

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
        p = self.progress
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
        return {
            **({} if p["last"] is None else {"accuracy": p["last"]}),
            **({"metrics": more} if more else {}),
            "evaluation_down": found.down,
            "seconds_evaluation": found.seconds,
            **({} if found.gradient is None else {"gradient_squared": found.gradient}),
        }

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

    def summary(self, run_dir: str, trained: int, partition_hash: str) -> dict[str, Any]:
        """The content of summary.json; docs/run-directory.md explains each key."""
        p, config = files.nulled(self.progress), self.view.config
        up, down = p["bytes"]["up"], p["bytes"]["down"]
        return {
            "algorithm": self.view.algorithm.name,
            "name": config.run.name,
            "seed": config.run.seed,
            "rounds": config.run.rounds,
            "run_dir": run_dir,
            **({} if config.data.task == "regression" else {"accuracy": {**(p["last"] or {}), "best": p["best"]}}),
            **{key: p[key] for key in ("metrics", "majority") if key in p},
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
