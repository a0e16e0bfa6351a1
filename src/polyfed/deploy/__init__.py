"""The same algorithm on real processes: what a deployment is, apart from the engine that carries its messages.

Free of Flower, which `polyfed.flower` alone imports; `polyfed.deploy.client.node` answers bytes with bytes and
`polyfed.deploy.server.clients` sends them over any `Transport`, so that everything here is tested without an engine.

Modules: ``settings`` (deploy.toml, and what a client says of itself), ``wire`` (headers of requests and replies),
``state_dir`` (a client's private state on its own disk), ``site`` (a client's data and network), ``node`` (one request,
one reply), ``check`` (replies that must not be aggregated), ``registry`` (who is there), ``remote`` (the clients as the
server meets them), ``server`` (rounds that survive), ``keys`` (certificates), ``commands``, ``processes``, ``cli``.
"""
