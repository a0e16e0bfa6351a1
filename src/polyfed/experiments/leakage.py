"""The view of what the features that clients show give away, beside the accuracy that they buy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from polyfed.attacks.inversion import Show, decoder_attack, white_box
from polyfed.attacks.labels import label_inference
from polyfed.attacks.similarity import mse, psnr, ssim
from polyfed.base.errors import ConfigError
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId, Params
from polyfed.blocks.features import FeatureExchange, Features, Pinned
from polyfed.blocks.losses import distance_correlation
from polyfed.core.clients import LocalClient
from polyfed.core.message import Nothing, State
from polyfed.core.net import Net
from polyfed.data.client import ClientData
from polyfed.experiments.inside import Inside
from polyfed.experiments.study import Attack
from polyfed.experiments.views import Results, View
from polyfed.report.units import percent
from polyfed.rounds.selection import draw_cohort

#: Images of the view's picture, for each algorithm.
PICTURED = 6
_LIKENESS = {"mse": mse, "psnr": psnr, "ssim": ssim}
_NUMBERS = (
    *("accuracy", "shown", "dcor", "blind_psnr", "blind_ssim"),
    *(f"{attack}_{name}" for attack in ("decoder", "search") for name in _LIKENESS),
    *("label_accuracy", "label_majority", "label_histogram"),
)


def leakage(results: Results) -> View:
    """What the features that clients show give away.

    Raises:
        ConfigError: the data are no images of 8 bits with classes.
    """
    attack, rows, last = results.study.attack, list[tuple[Any, ...]](), dict[tuple[str, str], tuple[str, Any]]()
    for (setting, label), cells in results.groups().items():
        for round_ in cells[0].config.run.keep_rounds:
            insides = [Inside(cell.run_dir(results.root), round_) for cell in cells]
            found = [leak(inside, attack) for inside in insides]
            numbers = [one for one, _ in found if one]
            if numbers:
                rows.append((setting, label, round_, *(_mean([one[name] for one in numbers]) for name in _NUMBERS)))
                which = f"round {round_}, client {insides[0].some(1)[0]}"
                last[setting, label] = f"{', '.join(filter(None, (setting, label)))}\n{which}", found[0][1]
    told = [(row[0] or "-", row[1], str(row[2]), *_text(dict(zip(_NUMBERS, row[3:], strict=True)))) for row in rows]
    return View(
        "leakage",
        f"What the pairs of the {attack.clients} first clients of unlike networks give away in the participation that "
        "follows the round. `accuracy`: of the server's networks, mean over architectures, on the attacker's "
        f"{attack.auxiliary} test images. `shown`: share of a client's training examples that it has shown so far. "
        "`dCor`: distance correlation of images and s_in as sent. PSNR (dB) and SSIM of images that a decoder, trained "
        f"in {attack.decoder_steps} steps on these test images, and a white-box search of {attack.search_steps} steps "
        "(one client) make of s_in as sent; `blind`: of the mean test image, which needs no features. `labels`: share "
        "of the batch's labels that classifier and s_out give, beside the share of the most frequent one; `mix`: half "
        "the L1 distance between the shares of classes so found and the true ones. The attacker is the server, with "
        "the client's own weights. An attack that fails shows that this attack fails, and nothing of a stronger one. "
        "The picture has images of the first client of the first seed in the last kept round, and beside them that "
        "round's means of the table; a dashed line is what a guess without features reaches: the mean image, or the "
        "most frequent label.",
        ("setting", "algorithm", "round", *_NUMBERS),
        rows,
        (
            (
                *("setting", "algorithm", "round", "accuracy", "shown", "dCor", "blind PSNR / SSIM"),
                *("decoder PSNR / SSIM", "search PSNR / SSIM", "labels / majority", "mix"),
            ),
            told,
        ),
        pictures=dict(last.values()),
    )


def _text(of: dict[str, Any]) -> tuple[str, ...]:
    alike = (f"{of[f'{kind}_psnr']:.1f} / {of[f'{kind}_ssim']:.2f}" for kind in ("blind", "decoder", "search"))
    labels = f"{percent(of['label_accuracy'], 0)} / {percent(of['label_majority'], 0)}"
    return (
        percent(of["accuracy"]),
        percent(of["shown"], 0),
        f"{of['dcor']:.2f}",
        *alike,
        labels,
        f"{of['label_histogram']:.2f}",
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def leak(inside: Inside, attack: Attack) -> tuple[dict[str, float], Any]:
    """The numbers of a kept round by name, means over clients, and pictures (3, n, C, H, W): images and what was found.

    Both are empty for an algorithm whose clients show no features.

    Args:
        inside: the kept round.
        attack: how much is spent.

    Raises:
        ConfigError: the data are no images of 8 bits with classes.
    """
    federation, algorithm = inside.federation, inside.kept.algorithm
    if not isinstance(algorithm, FeatureExchange):
        return {}, ()
    data = federation.dataset
    if data.x.dtype != torch.uint8 or data.task != "classification":
        raise ConfigError(
            f"show: the view leakage got a {data.task} of {data.x.dtype}; expected a classification of images of 8 "
            "bits, whose pixels have a range; choose another data set, or leave the view out"
        )
    with inside.placement.defaults():
        auxiliary = _pixels(inside, attack.auxiliary)
        uploads = inside.uploads(inside.some(1)[: attack.clients])
        found: list[dict[str, float]] = []
        pictures: Any = ()
        for client, upload in uploads.items():
            for pair in upload.pairs:
                numbers, images = _attacked(inside, client, upload.layers, pair, auxiliary, attack, first=not found)
                found.append(numbers)
                pictures = pictures if len(pictures) else images
        if not found:
            return {}, ()
        common = {"accuracy": _accuracy(inside, attack.auxiliary), "shown": shown_share(inside)}
    names = dict.fromkeys(name for numbers in found for name in numbers)
    return common | {name: _mean([one[name] for one in found if name in one]) for name in names}, pictures


def _attacked(
    inside: Inside,
    client: ClientId,
    weights: Params,
    pair: Features,
    auxiliary: Tensor,
    attack: Attack,
    *,
    first: bool,
) -> tuple[dict[str, float], Any]:
    """The attacks on the pair that a client sent beside its ``weights``; the search for the ``first`` client alone."""
    local = inside.federation.local(client, inside.kept.round + 1)
    algorithm, model = cast("Any", inside.kept.algorithm), local.models["model"]
    data = cast("ClientData", local.train)
    rows = algorithm.rows(Nothing(), local)
    images, labels = data.dataset.x[data.rows[rows]].to(auxiliary.dtype) / 255, data.labels[rows]
    rng = inside.federation.rng.at("round", inside.kept.round, "attack", client)
    with Net(model, weights).evaluating():
        show = shower(algorithm, local, weights, rng.at("veil"))
        known = shower(algorithm.seen_plainly(), local, weights, rng)
        made = {"blind": auxiliary.mean(0, keepdim=True).expand_as(images)}
        made["decoder"] = decoder_attack(
            pair.s_in, show, auxiliary, rng=rng, steps=attack.decoder_steps, batch=len(images), width=attack.width
        )
        if first:
            made["search"] = white_box(pair.s_in, known, images.shape[1:], rng=rng, steps=attack.search_steps)
        logits = model.classify(weights, pair.s_out.to(auxiliary.dtype))
    numbers = {
        f"{name}_{what}": float(measure(found, images).mean())
        for name, found in made.items()
        for what, measure in _LIKENESS.items()
    }
    labelled = label_inference(logits, labels)
    numbers |= {f"label_{name}": value for name, value in vars(labelled).items()}
    numbers["dcor"] = float(distance_correlation(images, pair.s_in))
    pictured = [images, made["decoder"], made["search"]] if first else []
    return numbers, np.stack([one[:PICTURED].float().numpy() for one in pictured]) if pictured else ()


def shower(exchange: FeatureExchange, client: LocalClient, weights: Params, rng: Rng) -> Show:
    """How a client with these weights shows s_in of images in [0, 1]; noise is drawn anew for each batch.

    Args:
        exchange: what it does to features.
        client: the client, whose network is in evaluation mode.
        weights: its network's weights.
        rng: randomness of the noise.
    """
    model, data, batches = client.models["model"], cast("ClientData", client.train), count()

    def show(images: Tensor) -> Tensor:
        s_in = model.extract(weights, data.normalised(images))
        return exchange.veil("s_in", s_in.to(torch.get_default_dtype()), rng.at(next(batches)))

    return show


def shown_share(inside: Inside) -> float:
    """The share of its training examples that a client has shown by the kept round, mean over clients.

    Cohorts and examples are drawn again as the run drew them; devices that fail are not.
    """
    federation, algorithm = inside.federation, cast("FeatureExchange", inside.kept.algorithm)
    shown: dict[ClientId, set[int]] = {}
    for round_ in range(1, inside.kept.round + 1):
        for info in draw_cohort(federation, round_):
            rows = shown.setdefault(info.id, set())
            private: State = Pinned(torch.tensor(sorted(rows))) if algorithm.pin and rows else Nothing()
            rows |= set(algorithm.rows(private, federation.local(info.id, round_)).tolist())
    clients = federation.config.clients.count
    return sum(len(rows) / len(federation.data.train(k)) for k, rows in shown.items()) / clients


def _pixels(inside: Inside, most: int) -> Tensor:
    """The first test images (n, C, H, W) of all clients, in [0, 1]."""
    data = inside.federation.data.global_test(range(inside.kept.config.clients.count))[0]
    return data.dataset.x[data.rows[:most]].to(torch.get_default_dtype()) / 255


def _accuracy(inside: Inside, most: int) -> float:
    """The accuracy of the server's networks on the first test images, mean over networks."""
    data = inside.federation.data.global_test(range(inside.kept.config.clients.count))[0]
    x, y = inside.placement.batch(data, torch.arange(min(most, len(data))))
    shares: list[float] = []
    for nets in inside.kept.nets.values():
        with torch.no_grad(), nets["model"].evaluating():
            shares.append(float((nets["model"](x).argmax(1) == y).double().mean()))
    return _mean(shares)
