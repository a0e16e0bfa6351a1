"""Checks that refuse a harmful reply under every algorithm; each algorithm adds its own in ``check_upload``."""

from __future__ import annotations

from polyfed.base.errors import MessageError
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_numbers
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message

#: The class of a client's error -> what to do about it, as far as it can be said without the text, which stays there.
_REMEDIES = {
    "CheckpointError": "its data, code or stored state changed since the run began: restore them, or start a new run",
    "ConfigError": "correct its settings: client number, --data-option, --model or --device",
    "DataError": "correct its data or --data-option, or the classes and columns of all sites in [data.agreed]",
    "DivergedError": "its numbers are no longer finite: lower train.lr, or look for wrong values in its data",
    "MemoryError": "give it more memory, or a smaller network or batch",
    "MessageError": "check that it runs the same version of polyfed, and for this client",
    "ModelError": "name a network that fits its data and the algorithm: --model, or clients.models",
    "StorageError": "check its disk, and that no other process uses its state directory",
}


def in_short(error: str) -> str:
    """Return a client's error as the server shows it: its class, and what to do.

    Args:
        error: the field of the reply, which names the class of the error; the client may have made it up.
    """
    text = "".join(c if c.isprintable() else "?" for c in error)
    remedy = _REMEDIES.get(text.partition(";")[0], "ask the operator of this client to read it")
    return f"{text}, and on its terminal; {remedy}"


def check_reply(algorithm: Algorithm, task: Task, client: ClientInfo, down: Message | None, up: Message | None) -> None:
    """Check that a reply can harm neither the server nor the other clients.

    Args:
        algorithm: the algorithm that defines the messages.
        task: the task, which the server and all clients know.
        client: the sender.
        down: the message that the client received.
        up: the message that the client sent.

    Raises:
        MessageError: the reply could do harm; the text names the cause.
    """
    if up is None:
        if down is not None:
            raise MessageError("the reply has no message; expected one, as the client received one")
        return
    if type(up) is type(down) and len(algorithm.messages) > 1:
        raise MessageError(f"the client sent a {type(up).__name__} back, the kind of message that it received")
    check_numbers(up)
    try:
        algorithm.check_upload(task, client, down, up)
    except MessageError:
        raise
    except Exception as error:  # the check itself failed on the message, such as on the length of a scalar
        raise MessageError(f"{type(up).__name__} cannot be checked ({type(error).__name__}: {error})") from error
