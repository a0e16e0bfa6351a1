"""Checks that refuse a harmful reply under every algorithm; each algorithm adds its own in ``check_upload``."""

from __future__ import annotations

from polyfed.base.errors import MessageError
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_numbers
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message


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
