"""Replies that must not be aggregated, whatever the algorithm; the rest is its own to say."""

from __future__ import annotations

from polyfed.base.errors import MessageError
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_numbers
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message


def check_reply(algorithm: Algorithm, task: Task, client: ClientInfo, down: Message | None, up: Message | None) -> None:
    """Nothing that a client sent can harm the server or the other clients.

    Args:
        algorithm: whose messages these are.
        task: what all know.
        client: who sent it.
        down: what it received.
        up: what it sent.

    Raises:
        MessageError: something could; says what.
    """
    if up is None:
        if down is not None:
            raise MessageError("nothing was sent where others sent something")
        return
    if type(up) is type(down) and len(algorithm.messages) > 1:
        raise MessageError(f"a {type(up).__name__} came back, which is what was sent")
    check_numbers(up)
    try:
        algorithm.check_upload(task, client, down, up)
    except MessageError:
        raise
    except Exception as error:  # the check itself fell over what came, such as the length of what has none
        raise MessageError(f"{type(up).__name__} cannot be checked ({type(error).__name__}: {error})") from error
