"""A new algorithm in one file, outside the package: FedAvg with a private head.

    M. G. Arivazhagan, V. Aggarwal, A. K. Singh, S. Choudhary: Federated Learning with Personalization Layers. 2019.
    https://arxiv.org/abs/1912.00818

All clients share the body of one network. Each keeps its own head, as clients with other classes need other answers.

    python new_algorithm.py                                compares it with training alone and with FedAvg
    pytest --algorithm new_algorithm:PrivateHead           tests it by the laws that polyfed's own algorithms obey
    polyfed run mine.toml                                  runs it, where mine.toml says

        [clients]
        models = ["cnn5"]

        [algorithm]
        name = "new_algorithm:PrivateHead"
"""

from dataclasses import dataclass

from polyfed import Algorithm, Comparison, Config, Message, State, compare, exchange, fit
from polyfed.base.tree import drop, pick
from polyfed.base.types import Params
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import supervised


# Its fields are the hyper-parameters, keys of [algorithm]. It has no other state: what must be remembered is returned.
@dataclass(frozen=True, kw_only=True)
class PrivateHead(Algorithm):
    """FedAvg of everything but the classifier."""

    name = "private-head"

    # A State is kept, a Message travels. States cannot be encoded: no head leaves its client by mistake.
    class Server(State):
        """The shared body."""

        body: Params

    class Private(State):
        """A client's head."""

        head: Params

    class Broadcast(Message):
        """The body."""

        body: Params

    class Upload(Message):
        """The body as trained, and its weight in the average."""

        body: Params
        num_examples: int

    def check(self, task):
        """Refuse what cannot work before the run starts: bodies are averaged, so there is one network."""
        task.common(self.name)

    def init_server(self, task, rng):
        """Random numbers come from generators that are named by what they are for, never from a global one."""
        model = task.common(self.name)
        return self.Server(drop(model.init(rng.at("body")), model.classifier_names))

    def init_client(self, client):
        """What a client keeps before it first trains."""
        model = client.models["model"]
        return self.Private(pick(model.init(client.rng.at("head")), model.classifier_names))

    def server_round(self, server, cohort):
        """The server's half of a round: send, and get what the answers add up to: a mean by numbers of examples."""
        got = yield from exchange(cohort, self.Broadcast(server.body), gather={"body": Mean("num_examples")})
        return self.Server(got["body"])

    def client_round(self, private, msg, client):
        """A client's half: body and head train together; then they part."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        model, head = fitted.parts["model"], private.head
        return self.Private(pick(model, head)), self.Upload(drop(model, head), len(client.train))

    def message_for(self, server, client):
        """What a client receives in order to predict."""
        return self.Broadcast(server.body)

    def predictor_parts(self, private, msg, client):
        """What it predicts with and trains from: the received body and its own head together."""
        return {"model": {**msg.body, **private.head}}


def main(*overrides: str) -> Comparison:
    """The main job with one network for all and two classes per client, on the same splits for all three."""
    config = Config.load(overrides=['clients.models=["cnn5"]', "partition.classes_per_client=2", *overrides])
    return compare(config, ["new_algorithm:PrivateHead", "standalone", "fedavg"], seeds=[0])


if __name__ == "__main__":
    print(main())
