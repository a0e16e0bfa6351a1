"""The two apps that Flower starts: one process per message at a client, one per run at the server.

The bundle that `polyfed deploy init` writes imports `client_app` and `server_app` from here and holds nothing else.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from polyfed.flower.grid import GridTransport, pack, unpack

client_app = ClientApp()
server_app = ServerApp()


@client_app.query()
@client_app.train()
@client_app.evaluate()
def _answer(message: Message, context: Context) -> Message:
    frame = unpack(message.content)
    worker = str(context.node_config.get("polyfed-worker", ""))
    if worker:
        from polyfed.deploy.client.worker import ask

        return Message(pack(*ask(Path(worker), *frame)), reply_to=message)
    started = time.perf_counter()
    importlib.import_module("torch")  # the larger part of a small round, so its seconds are reported separately

    imported = time.perf_counter() - started
    from polyfed.deploy.client.node import answer
    from polyfed.deploy.settings import NodeSettings

    settings = NodeSettings.load(Path(str(context.node_config["polyfed-settings"])))
    return Message(pack(*answer(*frame, settings, imported=imported)), reply_to=message)


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    from polyfed.deploy.host.parent import watch_parent
    from polyfed.deploy.server.loop import Status, serve

    folders = [Path(folder) for folder in str(context.run_config["run-dirs"]).split(os.pathsep)]
    watch_parent(lambda: Status(folders[0] / "status.json")("failed", error="the server ended; start it, then resume"))
    while folders:
        serve(folders[0], GridTransport(grid))
        folders.pop(0)
