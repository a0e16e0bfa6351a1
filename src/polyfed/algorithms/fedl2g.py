"""FedL2G: guiding vectors that are learnt so that one step of guided training helps on examples not trained on.

    J. Zhang, Y. Liu, Y. Hua, J. Cao, Q. Yang: An Effective and Efficient Approach of Learning to Guide for Federated
    Learning with Heterogeneous Models (FedL2G). 2024. https://arxiv.org/abs/2410.06490

Client k trains its network on labels, and its logits or representation towards a guiding vector v[y]. It then takes one
such step on paper, and sends the gradient for v of the loss of labels on held-out data. docs/algorithms/fedl2g.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.ranges import Count, NonNegative, Rate, Share
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.classwise import check_by_class, class_table, distance_to_class
from polyfed.blocks.losses import cross_entropy
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Net, Nets, alike
from polyfed.core.requests import ClientResult, Steps, exchange, fit, reduce


@dataclass(frozen=True, kw_only=True)
class FedL2G(Algorithm):
    """Hyper-parameters of FedL2G.

    Args:
        guide: ``"logits"`` (FedL2G-l, for any networks) or ``"features"`` (FedL2G-f, for equal widths).
        server_lr, server_clip: learning rate of v, by plain SGD, and the largest norm of its gradient; 0 is no limit.
            A rate of None is the authors': 0.1 for logits, 100 for features.
        warmup: how many of the first rounds learn v only, and leave the networks as they are.
        holdout: the share of each client's training examples that is held out, for the quiz.
    """

    name = "fedl2g"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "guiding vectors move even if no client does"}
    guide: Literal["logits", "features"] = "logits"
    server_lr: Rate | None = None
    server_clip: NonNegative = 100.0
    warmup: Count = 50
    holdout: Share = 0.1

    class Server(State):
        """v: a guiding vector (m,) by class, m being L or d."""

        vectors: Params

    class Private(State):
        """A client's model."""

        model: Params

    class Broadcast(Message):
        """v."""

        vectors: Params

    class Upload(Message):
        """The gradient (m,) of the quiz for the guiding vector of each class that the study batch had."""

        gradients: Params

    def __post_init__(self) -> None:
        """Where no rate is given, that of the kind; so the configuration of a run shows the number."""
        object.__setattr__(self, "server_lr", self.server_lr or {"logits": 0.1, "features": 100.0}[self.guide])

    def check(self, task: Task) -> None:
        """Rounds after the warm-up, and representations of one width where these are guided."""
        self.width(task)
        if task.rounds <= self.warmup:
            raise ModelError(
                f"algorithm.warmup = {self.warmup} rounds train no network; expected fewer; run.rounds = {task.rounds}"
            )

    def width(self, task: Task) -> int:
        """m: L, or d."""
        return task.num_classes if self.guide == "logits" else task.common_width(f"{self.name} with guide = 'features'")

    def init_server(self, task: Task, rng: Rng) -> Server:
        """V from a standard normal distribution."""
        v = torch.randn(task.num_classes, self.width(task), generator=rng.at("vectors").torch())
        return self.Server({str(c): row.clone() for c, row in enumerate(v)})

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send v; then v[c] -= server_lr * the mean gradient of the clients that have one for c, clipped."""
        got = yield from exchange(cohort, self.Broadcast(server.vectors), gather={"gradients": MeanByName()})
        mean: Params = got["gradients"]
        scale = self.server_clip / (float(torch.cat([*mean.values()]).norm()) + 1e-6) if self.server_clip else 1.0
        return self.Server(tree.add(server.vectors, mean, scale=-(self.server_lr or 0.0) * min(1.0, scale)))

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """After the warm-up E epochs of the guided loss; always one study batch, one quiz batch, and the gradient."""
        net, model = client.models["model"], private.model
        guide = class_table(msg.vectors, net.num_classes, len(msg.vectors["0"]))
        if client.round > self.warmup:
            fitted = yield from fit(client, {"model": model}, loss=self.loss, frozen={"guide": guide})
            model = fitted.parts["model"]
        assert client.held_out is not None  # by holdout
        asked = torch.randperm(len(client.held_out), generator=client.rng.at("quiz").torch())[: client.plan.batch_size]
        study = torch.randperm(len(client.train), generator=client.rng.at("study").torch())[: client.plan.batch_size]
        x, y = client.held_out.batch(asked, dtype=torch.get_default_dtype())
        parts = {"model": model, "guide": guide, "quiz": {"x": x, "y": y}}
        gradients = yield from reduce(client, parts, partial(self.meta_gradient, client.plan.rate("model")), rows=study)
        return self.Private(model), self.Upload(gradients)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(F(x), y) + MSE(F(x) or f(x), v[y])."""
        f = nets["model"].represent(batch[0]) if self.guide == "features" else None  # (B, d); logits need no cut
        logits = nets["model"](batch[0]) if f is None else nets["model"].classify(f)
        return cross_entropy(logits, batch) + distance_to_class(logits if f is None else f, batch[1], nets["guide"])

    def meta_gradient(self, lr: float, nets: Nets, study: Batch) -> Params:
        """The gradient by v of CE(F(quiz; w'), y) at w' = w - lr * d loss(study; w, v) / dw."""
        with torch.enable_grad():  # reduce() itself asks for none
            v = nets["guide"]["rows"].detach().requires_grad_()
            guide = Net(None, {**nets["guide"].params, "rows": v})
            after = nets["model"].stepped(lambda model: self.loss({"model": model, "guide": guide}, study), lr)
            quiz = alike(study, nets["quiz"]["x"], nets["quiz"]["y"])
            (gradient,) = torch.autograd.grad(cross_entropy(after(quiz[0]), quiz), v)  # (L, m)
        return {str(c): gradient[c] for c in study[1].unique().tolist()}

    def message_for(self, server: Server, client: ClientInfo) -> None:
        """Nothing is needed to predict."""

    def predictor_parts(self, private: Private, msg: Broadcast | None, client: LocalClient) -> Parts:
        """The client's own model."""
        return {"model": private.model}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Rows like the guiding vectors, for classes that there are."""
        check_by_class("gradients", up.gradients, task.num_classes, self.width(task))

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The model's logits."""
        return {"local": nets["model"](x)}
