"""The costs and accuracies of a run so far: the numbers of summary.json, updated in each round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from polyfed.base import files
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Size
from polyfed.rounds.evaluation import Evaluation
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
        """Enter an evaluation; return the accuracy half of the round's line."""
        p = self.progress
        p["bytes"]["evaluation_down"] += found.down
        p["flops_evaluation"] += found.flops
        p["flops_per_example"] = found.flops_per_example
        p["seconds_evaluation"] += found.seconds
        mean = found.mean()
        for i, target in enumerate(self.view.config.run.targets):
            if p["targets"][i] is None and mean >= target:
                p["targets"][i] = {"accuracy": target, "round": round_, **self.totals()}
        if p["best"] is None or mean > p["best"]["mean"]:
            p["best"] = {"mean": mean, "round": round_}
        p["last"] = {
            "mean": mean,
            "worst_decile": found.worst_decile(),
            "predictors": {name: found.mean(name) for name in found.predictors},
            "by_model": self._by(found, lambda info: info.architecture),
            "by_capacity": self._by(found, lambda info: f"{info.capacity:g}"),
            "before_aggregation": found.before_aggregation,
            "global": {name: pooled for name, (pooled, _) in found.whole.items()},
            "global_local": {name: local for name, (_, local) in found.whole.items()},
            "clients": len(found.scores),
        }
        return {
            "accuracy": p["last"],
            "evaluation_down": found.down,
            "seconds_evaluation": found.seconds,
            **({} if found.gradient is None else {"gradient_squared": found.gradient}),
        }

    def _by(self, found: Evaluation, kind: Callable[[ClientInfo], str]) -> dict[str, float]:
        groups: dict[str, list[int]] = {}
        for client in found.scores:
            groups.setdefault(kind(self.view.info(client)), []).append(client)
        return {name: found.mean(clients=clients) for name, clients in sorted(groups.items())}

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
            "accuracy": {**(p["last"] or {}), "best": p["best"]},
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
            row |= {"examples": score.examples, "correct": score.correct, "accuracy": score.accuracy()}
        rows.append(row)
    return rows


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
