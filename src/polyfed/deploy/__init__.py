"""The same algorithm on real processes: what a deployment is, apart from the engine that carries its messages.

Only `polyfed.flower` imports Flower. `polyfed.deploy.client.node` answers bytes with bytes and
`polyfed.deploy.server.clients` sends them over any `Transport`, so the tests of this package need no engine.

``settings`` reads deploy.toml and node.toml; ``cli`` holds the commands. Subpackages: ``wire`` (headers, frames, the
transport), ``server`` (the round loop, the connected clients, the checks of their replies), ``client`` (a client's
data, network, private state and its answer to a request), ``host`` (processes, keys, a deployment on this machine).
"""
