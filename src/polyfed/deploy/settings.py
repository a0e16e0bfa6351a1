"""Settings of a deployment, apart from the experiment: deploy.toml at the server, node.toml at a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError

from polyfed.base.errors import ConfigError
from polyfed.base.ranges import Count, Positive, Rate
from polyfed.base.text import hint
from polyfed.config.faults import by_key, dotted, sentence
from polyfed.config.toml import apply, parse_override, read_toml, to_toml

_T = TypeVar("_T", bound=BaseModel)

#: The file in the folder of a deployment that names the client of each registered node.
NODES = "nodes.json"


class Rounds(BaseModel, frozen=True, extra="forbid"):
    """Section ``[rounds]`` of deploy.toml: when a round ends, and what happens when clients fail.

    Args:
        min_clients: clients that must be connected before round 1, which begins as soon as they are; None is
            ``clients.count``.
        start_timeout: seconds to wait for these clients. Then a new run ends with an error that names the missing
            clients; a run that is resumed goes on if ``min_replies`` clients are connected.
        min_replies: with fewer good replies a round is void: the server's state stays what it was.
        deadline: seconds after which a round ends with the replies that came.
        oversample: share of further clients asked in a round, which ends when enough have answered.
        on_error: when a client fails: "skip" it; "retry" once, and wait until the deadline for a client that is not
            connected; or "abort" the run.
        max_void: void rounds in a row after which the run stops; it can be resumed once the cause is removed.
        max_message: largest message that the server accepts from a client, in MB.
        poll: seconds between two queries for replies.
    """

    min_clients: Positive | None = None
    start_timeout: Rate = 600.0
    min_replies: Positive = 1
    deadline: Rate = 600.0
    oversample: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    on_error: Literal["skip", "retry", "abort"] = "skip"
    max_void: Positive = 3
    max_message: Rate = 1024.0
    poll: Rate = 0.2


class Server(BaseModel, frozen=True, extra="forbid"):
    """Section ``[server]`` of deploy.toml: the address and the identity of the server.

    Args:
        address: host:port at which clients and commands reach it.
        certificates: folder with ca.crt, server.crt and server.key; None means no TLS, which only loopback permits.
        node_keys: only nodes whose public key was registered may join; needs TLS.
    """

    address: str = "127.0.0.1:8000"
    certificates: str | None = None
    node_keys: bool = False


class Deployment(BaseModel, frozen=True, extra="forbid"):
    """The whole of deploy.toml."""

    server: Server = Server()
    rounds: Rounds = Rounds()

    @classmethod
    def load(cls, path: Path | None, overrides: Sequence[str] = ()) -> Deployment:
        """Read deploy.toml with overrides such as ``"rounds.deadline=60"`` on top; None takes the defaults.

        Raises:
            ConfigError: all faults at once; those of overrides name the option ``--rule``.
        """
        tables: dict[str, Any] = {} if path is None else read_toml(path)
        faults, overridden = list[str](), list[tuple[str, ...]]()
        for override in overrides:
            try:
                key, value = parse_override(override, "--rule")
                apply(tables, key, value, "--rule")
                overridden.append(key)
            except ConfigError as error:
                faults += error.faults
        try:
            found = parsed(cls, tables, str(path or "deploy"), overridden)
        except ConfigError as error:
            raise ConfigError(*faults, *error.faults) from error
        if faults:
            raise ConfigError(*faults)
        if found.server.node_keys and found.server.certificates is None:
            raise ConfigError(
                f"{path}: server.node_keys: got true without TLS; set server.certificates, or run with --tls"
            )
        if found.server.certificates is not None and path is not None:
            folder = str((path.parent / found.server.certificates).absolute())
            found = found.model_copy(update={"server": found.server.model_copy(update={"certificates": folder})})
        return found

    def to_toml(self) -> str:
        """TOML text; `load` reads it back."""
        return to_toml(self.model_dump(exclude_none=True))


class NodeSettings(BaseModel, frozen=True, extra="forbid"):
    """The settings of a client. They stay with the client, but for those marked "sent to the server".

    Args:
        client: the number of the client, from 0; sent to the server.
        state_dir: folder of the private state; only its owner can read it.
        data: the client's own .csv, .parquet or .npz file, or folder of images by class; None takes its part of the
            configured data set.
        data_options: options of the reader of that file, such as ``{"label": "diagnosis"}``.
        path: the configured data set on this machine, if its path differs from the server's.
        model: the client's own network, "package.module:attribute" or a name of `polyfed list models`; None takes the
            network of the configuration. The name is not sent to the server.
        weights: the .safetensors file whose weights the client's network starts with, relative to node.toml.
        capacity: the fraction of a full-size model that the client can hold; None takes the configuration's; sent to
            the server.
        device: the device to train on; None takes the configuration's.
        threads: threads of torch; None takes the configuration's.
        tell: what the server may learn beside the declared messages: "scores" are counts of right answers on local
            test data and the mean training loss; "costs" are FLOPs, seconds, steps and memory, which hint at the
            network's size; "names" are the names of classes, columns and categories, of which else hashes are sent.
            None sends scores and names, and costs unless the network is the client's own.
        max_message: largest message that the client accepts from the server, in MB.
    """

    client: Count
    state_dir: str
    data: str | None = None
    data_options: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    model: str | None = None
    weights: str | None = None
    capacity: Annotated[float, Field(gt=0, le=1)] | None = None
    device: str | None = None
    threads: Positive | None = None
    tell: tuple[Literal["scores", "costs", "names"], ...] | None = None
    max_message: Rate = 1024.0

    @property
    def tells_scores(self) -> bool:
        """Whether the server learns counts and losses."""
        return self.tell is None or "scores" in self.tell

    @property
    def tells_names(self) -> bool:
        """Whether the server learns the names of classes, columns and categories."""
        return self.tell is None or "names" in self.tell

    @property
    def tells_costs(self) -> bool:
        """Whether the server learns FLOPs, seconds, steps and memory."""
        return self.model is None if self.tell is None else "costs" in self.tell

    @classmethod
    def load(cls, path: Path) -> NodeSettings:
        """Read node.toml.

        Raises:
            ConfigError: all faults at once.
        """
        tables = read_toml(path)
        node = tables.get("node")
        if not isinstance(node, dict) or len(tables) != 1:
            raise ConfigError(f"{path}: got {', '.join(tables) or 'no section'}; expected one section, [node]")
        found = parsed(cls, cast("dict[str, Any]", node), f"{path}: [node]")
        if found.weights is None:
            return found
        return found.model_copy(update={"weights": str((path.parent / Path(found.weights).expanduser()).absolute())})

    def to_toml(self) -> str:
        """TOML text; `load` reads it back."""
        return to_toml({"node": self.model_dump(exclude_none=True, exclude_defaults=True)})


def parsed(cls: type[_T], tables: Mapping[str, Any], source: str, overridden: Sequence[tuple[str, ...]] = ()) -> _T:
    """``tables`` as a ``cls``.

    Args:
        cls: the class.
        tables: its keys.
        source: where the keys come from.
        overridden: keys that come from the option ``--rule`` instead.

    Raises:
        ConfigError: all faults at once, each with the nearest valid key.
    """
    try:
        return cls.model_validate(dict(tables))
    except ValidationError as error:
        faults: list[str] = []
        for where, details in by_key(error).items():
            key, known = str(where[-1]), cls.model_fields
            inside = [f"{name}.{key}" for name in known if key in _below(cls, name)]
            for part in where[:-1]:
                known = _below(cls, str(part))
            near = f"; did you mean {inside[0]!r}?" if inside and len(where) == 1 else hint(key, known)
            text = (
                f"unknown key{near} known: {', '.join(known)}"
                if details[0]["type"] == "extra_forbidden"
                else sentence(details)
            )
            ruled = any(key == where[: len(key)] for key in overridden)
            faults.append(f"{'--rule' if ruled else source}: {dotted(*where)}: {text}")
        raise ConfigError(*faults) from error


def _below(cls: type[BaseModel], name: str) -> Mapping[str, Any]:
    """Return the keys of a section of ``cls``; none if ``name`` is no section."""
    inner = cls.model_fields[name].annotation if name in cls.model_fields else None
    return inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else {}
