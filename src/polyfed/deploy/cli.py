"""`polyfed deploy`: the commands of a deployment. Each prints the plain Flower command that it runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyfed.base import files
from polyfed.base.errors import ConfigError, PolyfedError, RunDirError

if TYPE_CHECKING:
    from polyfed.deploy.host.commands import Command
    from polyfed.deploy.host.local import Following
    from polyfed.deploy.settings import Deployment

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Run the same algorithm on real machines, over Flower. Start with: polyfed deploy local CONFIG --clients 3",
)

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the configuration. You may repeat this option."),
]
_Rule = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="KEY=VALUE", help="Change a key of deploy.toml, such as rounds.deadline=60."),
]
_Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, as for `polyfed run`.")]
_Dir = Annotated[Path, typer.Option("--dir", help="The folder that `polyfed deploy init` made.")]


@contextmanager
def _reported(go_on: Callable[[], str] = lambda: "") -> Generator[None]:
    """Print the message of an error that polyfed raises on purpose, and exit with its code."""
    try:
        yield
    except PolyfedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        command = go_on()
        typer.echo(f"\ninterrupted{f'; continue with: {command}' if command else ''}", err=True)
        raise typer.Exit(130) from None


def _say(command: Command | str) -> None:
    typer.echo(f"$ {command}")


_DEPLOY = """\
# Settings of this deployment, apart from the experiment. polyfed deploy server, run and status read this file.

[server]
address = "{address}"  # host:port at which clients and commands reach the server
{certificates}
node_keys = {node_keys}  # true: only nodes with a registered public key may join; needs certificates

[rounds]
# min_clients = 3        # clients that must be connected before round 1; by default clients.count
start_timeout = 600.0    # seconds to wait for these clients; then a new run ends with an error
min_replies = 1          # with fewer good replies a round is void, and the server's state does not change
deadline = 600.0         # seconds after which a round ends with the replies so far
oversample = 0.0         # share of clients that a round asks in addition; it ends when enough have answered
on_error = "skip"        # if a client fails: "skip" it, "retry" once and wait for it, or "abort" the run
max_void = 3             # void rounds in a row after which the run stops; you can resume it
max_message = 1024.0     # MB; largest message that the server accepts from a client
poll = 0.2               # seconds between two looks for replies
"""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make, new or empty.")],
    host: Annotated[str, typer.Option(help="Name or address at which clients reach the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port at which clients reach the server.")] = 8000,
    tls: Annotated[
        bool, typer.Option("--tls", help="Make a certificate authority, the server's certificate and node keys.")
    ] = False,
    clients: Annotated[int, typer.Option(min=1, help="With --tls: the number of clients to make keys for.")] = 3,
) -> None:
    """Make the folder of a deployment: Flower's app bundle, deploy.toml, and with --tls certificates and keys."""
    with _reported():
        from polyfed.deploy.host import commands
        from polyfed.deploy.settings import Deployment

        if (folder / "deploy.toml").exists():
            raise RunDirError(f"{folder} holds a deployment already; choose another folder, or change its deploy.toml")
        commands.write_app(folder)
        told = (
            'certificates = "certificates"'
            if tls
            else "# certificates = ...    # folder of ca.crt, server.crt, server.key"
        )
        if tls:
            from polyfed.deploy.host import keys

            keys.authority(folder / "certificates", list(dict.fromkeys([host, "localhost", "127.0.0.1"])))
            for client in range(clients):
                keys.node_key(folder / "keys" / f"client-{client}")
        files.write(
            folder / "deploy.toml",
            _DEPLOY.format(address=f"{host}:{port}", certificates=told, node_keys=str(tls).lower()).encode(),
        )
        commands.write_connection(folder / "flwr", Deployment.load(folder / "deploy.toml"))
        typer.echo(f"{folder} holds deploy.toml and Flower's app bundle.")
        if tls:
            typer.echo(
                f"Give each client its own {folder / 'keys'}/client-K and a copy of {folder / 'certificates'}/ca.crt; "
                "ca.key and server.key stay here."
            )
        typer.echo(f"Next, on this machine: polyfed deploy server --dir {shlex.quote(str(folder))}")


@app.command()
def server(
    folder: _Dir,
    listen: Annotated[
        str | None, typer.Option(help="Address to listen on, such as 0.0.0.0. Default: the host of deploy.toml.")
    ] = None,
) -> None:
    """Start the server in the foreground, and register the node keys DIR/keys/*.pub."""
    with _reported():
        from polyfed.deploy.host import commands
        from polyfed.deploy.host.processes import Processes, listening
        from polyfed.deploy.settings import NODES

        deployment = _deployment(folder)
        commands.write_connection(folder / "flwr", deployment)
        command = commands.superlink(folder / "flwr", deployment, folder / "superlink.db")
        if listen is not None:
            place = command.words.index("--host") + 1
            command = replace(command, words=(*command.words[:place], listen, *command.words[place + 1 :]))
        _say(command)
        with Processes(folder / "logs") as processes, _terminable():
            processes.start("server", command, {"PYTHONPATH": _path()})
            while not listening(deployment.server.address):
                processes.check("server")
                time.sleep(0.2)
            if deployment.server.node_keys:
                from polyfed.deploy.host import keys

                def register(key: Path) -> str | None:
                    command = commands.register(folder / "flwr", key)
                    _say(command)
                    return processes.register(command)

                for number, node in keys.bind_nodes(folder / "keys", folder / NODES, register).items():
                    typer.echo(f"client {number} is node {node}, by its key client-{number}.pub")
            typer.echo(
                f"the server answers at {deployment.server.address}; its log is {folder / 'logs' / 'server.log'}"
            )
            processes.running["server"].wait()
            processes.check("server")


@app.command()
def client(
    server_: Annotated[str, typer.Option("--server", help="host:port of the server.")],
    number: Annotated[int, typer.Option("--client", min=0, help="This client's number, from 0.")],
    state: Annotated[Path, typer.Option(help="Folder for private state. Only its owner can read it.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="This client's .csv, .parquet or .npz file, or folder of images by class. Default: its part of the "
            "configured data set."
        ),
    ] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the reader of --data, such as label=diagnosis."),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Path of the configured data set on this machine.")] = None,
    model: Annotated[
        str | None, typer.Option(help='Your own network, "my_pkg.nets:SecretNet". The server does not learn its name.')
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The .safetensors file whose weights this client's network starts with.")
    ] = None,
    capacity: Annotated[
        float | None, typer.Option(help="Fraction of a full-size model that this client can hold.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the configuration's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of torch's CPU threads.")] = None,
    tell: Annotated[
        str | None,
        typer.Option(help='What the server may learn, such as "scores,names": of scores, costs and names; or nothing.'),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="ca.crt of the deployment. Without it the client uses no TLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="This client's private key.")] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port on loopback for Flower's own processes on this machine. Default: 9094 + number."),
    ] = None,
) -> None:
    """Start a client in the foreground: its node, and a worker that keeps torch and data loaded."""
    with _reported():
        from polyfed.config.toml import apply, parse_override
        from polyfed.deploy.client.lock import in_use
        from polyfed.deploy.client.state_dir import private_folder
        from polyfed.deploy.host import commands
        from polyfed.deploy.host.errors import ErrorLog
        from polyfed.deploy.host.processes import Processes, free_port
        from polyfed.deploy.settings import NodeSettings, parsed

        options: dict[str, Any] = {}
        for one in data_option or ():
            apply(options, *parse_override(one, "--data-option"), "--data-option")
        told: dict[str, Any] = {
            "client": number,
            "state_dir": str(state.absolute()),
            "data": None if data is None else str(data.absolute()),
            "data_options": options,
            "path": None if path is None else str(path.absolute()),
            "model": model,
            "weights": None if weights is None else str(weights.absolute()),
            "capacity": capacity,
            "device": device,
            "threads": threads,
            "tell": None if tell is None else () if tell == "nothing" else tuple(tell.split(",")),
        }
        settings = parsed(NodeSettings, {k: v for k, v in told.items() if v is not None}, "polyfed deploy client")
        if data is not None and not data.exists():
            raise ConfigError(f"--data: {data}: no such file")
        private_folder(state)
        with in_use(state.absolute()):  # refuses a second client at once; the worker then holds it
            pass
        if not free_port(local_port := port or 9094 + number):
            raise ConfigError(f"port {local_port} of 127.0.0.1 is in use; give another with --port")
        file = state.absolute() / "node.toml"
        files.write(file, settings.to_toml().encode())
        with (
            tempfile.TemporaryDirectory(prefix="polyfed-", ignore_cleanup_errors=True) as sockets,
            Processes(state / "logs") as processes,
            _terminable(),
        ):
            socket = Path(sockets) / "worker.sock"
            node = commands.supernode(
                state.absolute() / "flwr", server_, file, port=local_port, ca=ca, key=key, worker=socket
            )
            for name, command in (("worker", commands.worker(socket, file)), ("node", node)):
                _say(command)
                processes.start(name, command, {"PYTHONPATH": _path()})
            typer.echo(
                f"client {number} runs; its logs are in {state / 'logs'}, its errors in {state / 'errors.jsonl'}"
            )
            errors = ErrorLog(state / "errors.jsonl")
            while True:
                for text in errors.new():
                    typer.echo(f"client {number}, {text}", err=True)
                processes.check("worker")
                if ended := processes.tend("node"):
                    typer.echo(f"the node ended and starts again; the end of its log:\n{ended}", err=True)
                time.sleep(0.5)


@app.command()
def run(
    config: _Config,
    folder: _Dir,
    overrides: _Set = None,
    rules: _Rule = None,
    out: Annotated[Path | None, typer.Option(help="Run directory on the server's machine, new or empty.")] = None,
) -> None:
    """Submit a configuration on the server's machine, and follow the run."""
    run_dir = out or _default(config)
    with _reported(lambda: f"polyfed deploy resume {shlex.quote(str(run_dir))} --dir {shlex.quote(str(folder))}"):
        from polyfed.config import Config
        from polyfed.deploy.server.loop import create
        from polyfed.deploy.settings import NODES

        deployment = _deployment(folder, rules)
        create(
            run_dir,
            Config.load(config, overrides or ()),
            deployment,
            folder / NODES if deployment.server.node_keys else None,
        )
        _submit(folder, run_dir)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a deployed run.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The folder of the deployment. A local deployment needs none.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Go on after the end of the run, to this number of rounds.")
    ] = None,
) -> None:
    """Resume a run at the round that was due, after the server was killed or the run stopped or ended."""
    where = "" if folder is None else f" --dir {shlex.quote(str(folder))}"
    with _reported(lambda: f"polyfed deploy resume {shlex.quote(str(run_dir))}{where}"):
        if not (run_dir / "deployed.json").exists():
            raise RunDirError(f"{run_dir} holds no deployed run: there is no deployed.json in it")
        told = json.loads((run_dir / "deployed.json").read_text())
        if folder is None and "local" not in told:
            raise ConfigError("--dir: missing; give the folder of the deployment, which holds deploy.toml")
        if rounds is not None:
            from polyfed.deploy.server.loop import go_on

            go_on(run_dir, rounds)
        if folder is not None:
            from polyfed.deploy.settings import NODES

            if "nodes" in told:  # the folder may have moved
                files.write_json(run_dir / "deployed.json", told | {"nodes": str((folder / NODES).absolute())})
            _submit(folder, run_dir)
        else:
            _play_locally(run_dir, told["local"]["clients"], told["local"]["tls"])


@app.command()
def status(
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The folder of the deployment: show its nodes and runs.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option("--run", help="A run directory: show its round and events.")] = None,
) -> None:
    """Show the connected nodes, the runs, and the last events."""
    with _reported():
        if folder is None and run_dir is None:
            raise ConfigError("status: give --dir, --run, or both")
        if folder is not None:
            from polyfed.deploy.host import commands
            from polyfed.deploy.host.processes import Processes

            with Processes(folder / "logs") as processes:
                for kind, command in (
                    ("node", commands.nodes(folder / "flwr")),
                    ("run", commands.listing(folder / "flwr")),
                ):
                    _say(command)
                    for row in json.loads(processes.call(command)).get(f"{kind}s", []):
                        typer.echo(f"  {kind} {row.get(f'{kind}-id')}  {row.get('status')}")
        if run_dir is not None:
            from polyfed.deploy.server.loop import told

            if not (run_dir / "status.json").exists():
                raise RunDirError(f"{run_dir} holds no deployed run that has begun")
            typer.echo(
                "  ".join(
                    f"{k} {v}" for k, v in json.loads((run_dir / "status.json").read_text()).items() if k != "time"
                )
            )
            events = run_dir / "events.jsonl"
            for line in events.read_text().splitlines()[-10:] if events.exists() else ():
                row = json.loads(line)
                typer.echo(f"  {row['time']}  {told(row)}")


@app.command()
def local(
    config: _Config,
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 3,
    overrides: _Set = None,
    rules: _Rule = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, new or empty.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS and node keys.")] = False,
) -> None:
    """Run server and clients as real processes on this machine, and end all of them afterwards."""
    run_dir = out or _default(config)
    with _reported(lambda: f"polyfed deploy resume {shlex.quote(str(run_dir))}"):
        from polyfed.config import Config, load_algorithm
        from polyfed.deploy.server.loop import create
        from polyfed.deploy.settings import NODES, Deployment
        from polyfed.rounds.federation import deal_to

        settings = Config.load(config, [*(overrides or ()), f"clients.count={clients}"])
        deployment = Deployment.load(None, rules or ())
        algorithm = load_algorithm(settings.algorithm.name, settings.algorithm.keys)
        deal_to(algorithm, settings)  # each client would refuse what cannot be dealt, and the server would wait
        create(
            run_dir,
            settings,
            deployment,
            run_dir / "deployment" / NODES if tls else None,
        )
        about = json.loads((run_dir / "deployed.json").read_text())
        files.write_json(run_dir / "deployed.json", about | {"local": {"clients": clients, "tls": tls}})
        _play_locally(run_dir, clients, tls)


def _play_locally(run_dir: Path, clients: int, tls: bool) -> None:
    from polyfed.deploy.host.errors import ErrorLog
    from polyfed.deploy.host.local import Local

    with _terminable(), Local(run_dir / "deployment", clients, tls=tls, say=_say) as there:
        errors = {k: ErrorLog(there.node_file(k).parent / "state" / "errors.jsonl") for k in range(clients)}

        def tend() -> None:
            for client, log in errors.items():
                for text in log.new():
                    typer.echo(f"client {client}, {text}", err=True)
            there.tend()

        with _watched(run_dir) as following:
            number = there.submit([run_dir])
            following.until_ended(tend)
        found = there.engine_bytes(number)
    _ended(run_dir, found)


def _submit(folder: Path, run_dir: Path) -> None:
    from polyfed.deploy.host import commands
    from polyfed.deploy.host.local import engine_bytes
    from polyfed.deploy.host.processes import Processes

    home = folder / "flwr"
    with Processes(folder / "logs") as processes:
        command = commands.run(home, folder / "app", [run_dir])
        _say(command)
        with _watched(run_dir) as following:
            number = str(json.loads(processes.call(command))["run-id"])
            try:
                following.until_ended()
            except KeyboardInterrupt:
                command = commands.stop(home, number)
                _say(command)
                processes.call(command)
                raise
        found = engine_bytes(processes.call(commands.listing(home)), number)
    _ended(run_dir, found)


@contextmanager
def _watched(run_dir: Path) -> Generator[Following]:
    """Live progress of a run that is about to be submitted."""
    from polyfed.config import Config
    from polyfed.deploy.host.local import Following
    from polyfed.deploy.server.loop import told
    from polyfed.report.consoles import console
    from polyfed.report.progress import callback_for, close

    settings = Config.load(run_dir / "config.toml")
    callback = callback_for(console())(f"{settings.algorithm.name} deployed")
    begun = False

    def seen(kind: str, row: dict[str, Any]) -> None:
        nonlocal begun
        if kind == "event":
            callback.note(told(row))
            return
        if not begun:
            begun = True
            callback.started(run_dir, settings, max(1, row["round"]))
        if "rounds" in row:
            callback.round_ended(row)

    try:
        yield Following(run_dir, seen)
    finally:
        close(callback)


def _ended(run_dir: Path, engine: dict[str, int]) -> None:
    """The closing table, and polyfed's bytes beside Flower's."""
    from polyfed.metrics.catalogue import headline
    from polyfed.report.consoles import console
    from polyfed.report.tables import show
    from polyfed.report.units import size

    summary = json.loads((run_dir / "summary.json").read_text())
    ours = summary["deployed"]["traffic"]
    summary["deployed"]["engine"] = engine
    files.write_json(run_dir / "summary.json", summary)
    if "mean" in headline(summary)[1]:
        show(console(), {summary["algorithm"]: summary})
    else:
        typer.echo(f"no client reported a score; the run is in {run_dir}")
    if engine:
        typer.echo(
            f"Messages to clients: {size(ours['sent'])}, from them {size(ours['received'])}; Flower counts "
            f"{size(engine.get('outbound', 0))} out and {size(engine.get('inbound', 0))} in. Flower adds its own "
            "envelopes, and stores equal chunks of a message once, although they travel to each client."
        )


def _deployment(folder: Path, rules: list[str] | None = None) -> Deployment:
    from polyfed.deploy.settings import Deployment

    if not (folder / "deploy.toml").exists():
        raise ConfigError(f"--dir: {folder} holds no deploy.toml; make one with `polyfed deploy init {folder}`")
    return Deployment.load(folder / "deploy.toml", rules or ())


def _default(config: Path) -> Path:
    return Path("runs") / f"{config.stem}-deployed-{datetime.now():%Y%m%d-%H%M%S}"


def _path() -> str:
    """PYTHONPATH with the working directory, as `polyfed` itself has it: your own algorithms and networks."""
    return os.pathsep.join(part for part in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if part)


@contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM end the started processes, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
