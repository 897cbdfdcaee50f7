"""`python -m flashrl_trainer.reward_worker package.module:function FD`: calls a user's reward in a process of its own.

It may print, hang, crash or eat memory here. Knows the one function and a socket; knows nothing of time limits.

Lines of JSON over the socket: first {"ready": true} or {"error": "..."}; then, for each {"text": ..., "answer": ...},
{"value": 1.0} or {"error": "..."}.
"""

import json
import os
import socket
import sys
import threading
from queue import SimpleQueue
from typing import Any

from flashrl_trainer.rewards import Reward, resolve_reward

LONGEST_ERROR = 300  # characters: a reward's complaint may quote the text


def main() -> None:
    """Serve until the other end closes, even while the reward hangs."""
    connection = socket.socket(fileno=int(sys.argv[2]))
    requests: SimpleQueue[dict[str, str]] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    try:
        reward = resolve_reward(sys.argv[1])
    except BaseException as error:  # the outermost edge: whatever a user's module raises, SystemExit too
        _send(connection, {"error": _told(sys.argv[1], error)})
        return
    _send(connection, {"ready": True})
    while True:
        _send(connection, _judged(reward, requests.get()))


def _judged(reward: Reward, request: dict[str, str]) -> dict[str, Any]:
    try:
        return {"value": reward(request["text"], request["answer"])}
    except BaseException as error:  # the same
        return {"error": _described(error)}


def _told(name: str, error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"reward: cannot import {name!r}: {_described(error)}"


def _described(error: BaseException) -> str:
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}..."


def _read(connection: socket.socket, requests: "SimpleQueue[dict[str, str]]") -> None:
    with connection.makefile("rb") as lines:
        for line in lines:
            requests.put(json.loads(line))
    os._exit(0)  # nobody listens any more


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
