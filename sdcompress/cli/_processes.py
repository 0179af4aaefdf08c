"""A group of processes (`accelerate launch`, `torchrun`): all end, with the reason, when one of them is lost."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

import click

from sdcompress.support.console import LAUNCHED

if TYPE_CHECKING:
    from accelerate import PartialState

SHARED = (
    *(("distill",), ("few-step",), ("distill-decoder",), ("finetune",)),
    *(("lora", "train"), ("data", "cache")),
)
"""The commands that share their work among processes."""
ALONE = (("run",), ("demo",))
"""The other commands that train."""
GRACE_S = 10.0
"""How long a process may take to end by itself after another one has ended."""
LAUNCHER_CHECK_S = 2.0
NOTICE_S = 3.0
"""How long the end of a process may take to be noticed after an exchange with it has failed."""
LONGEST_EXCHANGE_S = 2 * 3600.0
"""How long a process waits for the others, such as while one of them writes. The watch notices the end of a process,
so that this may be long."""
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds and tries after which the system gives up a connection to a machine that no longer answers."""


def is_launched_in_group() -> bool:
    """Returns whether a launcher has started this process as one of several, for a command that shares its work."""
    count = os.environ.get("WORLD_SIZE", "")
    launched = set(os.environ) >= LAUNCHED and count.isdecimal() and int(count) > 1
    return launched and _is_typed(SHARED)


def check_variables() -> None:
    """Refuse a launcher's variables that accelerate could not read, for a command that trains.

    Raises:
        UsageError: one is no number, or one that goes with it is not set.
    """
    from sdcompress_engines.errors import UsageError, shorten

    if not _is_typed(SHARED + ALONE):
        return
    numbers = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    for name, value in numbers.items():
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UsageError(
                f"{name} in the environment is {shorten(repr(value), 60)}",
                expected="a number, as torchrun and accelerate launch set it",
                hint=f"unset {name}",
            )
    missing = sorted(LAUNCHED - set(os.environ))
    if int(numbers.get("WORLD_SIZE", 1)) > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE in the environment is {numbers['WORLD_SIZE']}, and {', '.join(missing)} is not set",
            expected="torchrun or accelerate launch, which set all of them",
            hint="unset WORLD_SIZE, for one process",
        )


def _is_typed(commands: Iterable[tuple[str, ...]]) -> bool:
    return any(tuple(sys.argv[1 : 1 + len(words)]) == words for words in commands)


@contextmanager
def watch_processes() -> Iterator[None]:
    """Join the other processes of the launch, and end with them, for the block. Alone, this does nothing.

    The libraries wait for a lost process: NCCL 10 minutes, gloo on another machine 30. Here each process holds a
    connection to process 0, which the system closes when one of them dies, however it dies.

    Raises:
        SystemExit: another process was lost or failed, which the watch has reported.
        UsageError: the launcher asks for what training cannot do.
    """
    check_variables()
    if not is_launched_in_group():
        yield
        return
    from sdcompress_engines.errors import SdCompressError, shorten

    state = join_processes()
    watch = Watch(state)
    try:
        yield
    except (SdCompressError, click.ClickException) as error:
        watch.leave(shorten(error))
        raise
    except Exception as error:
        if watch.other_ended.wait(NOTICE_S):  # this error is only what came of it
            watch.leave("")
            raise SystemExit(1) from error
        watch.leave(f"{type(error).__name__}: {shorten(error)}")
        raise
    except BaseException as error:
        watch.leave(None if isinstance(error, SystemExit) and not error.code else "stopped")
        raise
    else:
        watch.leave(None)
        state.destroy_process_group()


def join_processes() -> PartialState:
    """Join the other processes of the launch; returns accelerate's state of them.

    Raises:
        UsageError: the launcher asks for what training cannot do.
    """
    import torch
    from accelerate import PartialState

    from sdcompress.train.sharding import refuse_unsupported

    refuse_unsupported()
    # With --use_fsdp accelerate's launcher asks transformers for empty weights in all processes but one.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=LONGEST_EXCHANGE_S))


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        process: its number.
        pid, host: where it ran.
        reason: its line; "" if it ended because of another; None if it was lost.
    """

    process: int
    pid: int
    host: str
    reason: str | None


class Watch:
    """Watches the processes of a group. Process 0 holds a connection to each of the others and passes on who ended.

    Every process creates one, at the same time.

    Args:
        state: accelerate's, of the joined group.

    Attributes:
        other_ended: set as soon as another process was lost or failed.
    """

    def __init__(self, state: PartialState) -> None:
        self.me = End(state.process_index, os.getpid(), socket.gethostname(), None)
        self.count = state.num_processes
        self.other_ended, self._left = threading.Event(), threading.Event()
        self.connections: list[socket.socket] = []
        self._connect()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._await_launcher, args=(os.getppid(),), name="watch", daemon=True).start()

    def _connect(self) -> None:
        """Fill `connections`: of process 0 to all others, of the others to process 0."""
        from accelerate.utils import broadcast_object_list

        alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        address: list[Any] = [None, None, None]
        listener = socket.create_server(("127.0.0.1" if alone else "", 0), backlog=self.count) if self._first else None
        if listener is not None:
            address = [listener.getsockname()[1], secrets.token_hex(16), asdict(self.me)]
        port, token, first = broadcast_object_list(address)
        if listener is None:
            host = "127.0.0.1" if alone else os.environ["MASTER_ADDR"]
            connection = socket.create_connection((host, port), timeout=60)
            _send(connection, {"token": token} | asdict(self.me))
            self._listen_to(connection, connection.makefile(encoding="utf-8"), End(**first))
            return
        with closing(listener):
            listener.settimeout(60)
            while len(self.connections) < self.count - 1:
                connection, _ = listener.accept()
                connection.settimeout(60)
                with suppress(ValueError, OSError, TypeError):  # a stranger's
                    reader = connection.makefile(encoding="utf-8")
                    hello = json.loads(reader.readline(1000))
                    if secrets.compare_digest(hello.pop("token"), token):
                        self._listen_to(connection, reader, End(**hello))

    @property
    def _first(self) -> bool:
        return self.me.process == 0

    def _listen_to(self, connection: socket.socket, reader: TextIO, other: End) -> None:
        """Watch a connection, on a thread of its own."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not everywhere
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connections.append(connection)
        threading.Thread(target=self._await_end, args=(reader, other), name="watch", daemon=True).start()

    def leave(self, reason: str | None) -> None:
        """Let the others know that this process is about to end.

        Args:
            reason: the line of its failure; "" if it ends because of another; None if it has done its work.
        """
        self._left.set()
        self._tell_others({"done": True} if reason is None else asdict(self.me) | {"reason": reason})

    def _tell_others(self, message: dict[str, Any]) -> None:
        for connection in self.connections:
            with suppress(OSError):
                _send(connection, message)

    def _await_end(self, reader: TextIO, other: End) -> None:
        """Wait for the message of a process, or for its connection to close without one: it was lost."""
        try:
            line = reader.readline()
        except OSError:
            line = ""
        message = json.loads(line) if line else asdict(other)
        if not message.get("done"):
            self._end_with(End(**message))

    def _await_launcher(self, launcher: int) -> None:
        """Wait for the end of `accelerate launch` or `torchrun`, which started this process and would end it."""
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_CHECK_S)
        self._end("the launcher was lost; it was killed" if self._first else None)

    def _end_with(self, end: End) -> None:
        """End this process because of another, which is named where no other process of this machine does it."""
        if self._first:
            self._tell_others(asdict(end))
        lost, far = end.reason is None, end.host != self.me.host
        line = None
        if (lost and (self._first or end.process == 0)) or (end.reason and far and self._first):
            who = f"process {end.process} of {self.count} (pid {end.pid} on {end.host})"
            line = f"{who} " + ("was lost; it was killed, or its machine failed" if lost else f"failed: {end.reason}")
        self._end(line)

    def _end(self, line: str | None) -> None:
        """Report why all processes end; end this one if it does not end by itself."""
        if self.other_ended.is_set() or self._left.is_set():
            return
        if line is not None:
            print(f"sdcompress: {line}; all processes end", file=sys.stderr, flush=True)
        self.other_ended.set()
        time.sleep(GRACE_S)
        os._exit(1)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
