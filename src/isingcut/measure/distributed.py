"""Measuring with several processes: rank 0 leads, the others compute what it hands out.

    torchrun --nproc-per-node 4 -m isingcut run MODEL --remove 6 --out DIR

Rank 0 runs the program as if it were alone. Where it comes to a measurement that is marked
`together`, it sends the call's arguments to the other ranks, each of which has loaded the same
model, and its micro-batches are shared out (`sharing.py`). Nothing but rank 0 ever writes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from isingcut.errors import InputError, IsingcutError, ModelError, RankError
from isingcut.measure import sharing
from isingcut.measure.crew import Crew, Ended, expected
from isingcut.measure.orders import pack, unpack
from isingcut.printing import say
from isingcut.progress import Progress, silent

if TYPE_CHECKING:
    from isingcut.options.config import RunConfig

P = ParamSpec("P")
T = TypeVar("T")

_LOCAL = ("replay", "progress", "journal", "description")
"""Arguments of a measurement that every process has of its own."""


class Announced(Protocol):
    """What all processes must agree on of a model in use (`session.Session`)."""

    config: RunConfig
    progress: Progress

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def streaming(self) -> bool: ...

    @property
    def replay(self) -> Any: ...


Opener = Callable[[dict[str, Any]], Announced]
"""Makes a model in use from its options."""


class _Post:
    """What this process knows of the run it takes part in."""

    home: Crew | None = None
    """Of this process, for as long as it lives."""
    crew: Crew | None = None
    """While it takes part in a run."""
    session: Announced | None = None
    orders: int = 0


_post = _Post()


def led(work: Callable[[], T], opened: Opener) -> T | None:
    """Run ``work`` on rank 0 while all other processes of the launcher serve it.

    Args:
        opened: how the others open the model that rank 0 announces.

    Returns:
        What ``work`` returns; None in the other processes. Without a launcher, and inside
        another `led`, it just runs.

    Raises:
        RankError: another process failed; every process raises it within a second or two.
    """
    if _post.crew is not None or not expected():
        return work()
    _post.home = crew = _post.home or Crew.from_environment()
    result = None
    try:
        crew.meet()
        _post.crew, _post.orders = crew, 0
        own_group = _join_group(crew)
        leaving: SystemExit | None = None
        if crew.rank:
            _serve(crew, opened)
        else:
            try:
                result = work()
            except SystemExit as e:
                if e.code:
                    raise
                leaving = e
            _order(crew, {"order": "done"}, {})
        crew.part()
        if own_group:
            _leave_group()
        if leaving is not None:
            raise leaving
        return result
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        told = _told(crew, e)
        if told is e:
            raise
        raise told from e
    finally:
        _post.crew = _post.session = None


def _told(crew: Crew, error: BaseException) -> BaseException:
    """The error to raise here, once all other processes know of it."""
    if isinstance(error, RankError):
        crew.fail(error.code, str(error))
        return error
    code, text = 1, f"internal error ({type(error).__name__}: {' '.join(str(error).split())})"
    if isinstance(error, IsingcutError):
        code, text = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif isinstance(error, SystemExit):
        code, text = error.code if isinstance(error.code, int) else 1, "was ended"
    if not crew.fail(code, text, hurry=isinstance(error, Ended)):
        assert crew.failure is not None
        return crew.error(crew.failure)
    if isinstance(error, Ended):
        # Launchers end all processes when one was killed; rank 0 says so for all.
        text = "ended by a signal, as launchers do when one process was killed; what is finished "
        return RankError(
            text + "is kept, the same command goes on", code=code, reported=crew.rank > 0
        )
    if not crew.rank:
        return error
    quiet = isinstance(error, KeyboardInterrupt)
    return RankError(f"rank {crew.rank} of {crew.size}: {text}", code=code, reported=quiet)


def _join_group(crew: Crew) -> bool:
    """A process group for collectives; whether it had to be made."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if crew.local_rank < gpus:
        # "cuda" without a number means this one from here on.
        torch.cuda.set_device(crew.local_rank)
    if dist.is_initialized():
        return False
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo",
        store=distributed_c10d.PrefixStore("group", crew.store),
        rank=crew.rank,
        world_size=crew.size,
        timeout=timedelta(seconds=60),
    )
    return True


def _leave_group() -> None:
    import torch.distributed as dist

    with suppress(RuntimeError):
        dist.destroy_process_group()


# Rank 0 -------------------------------------------------------------------------------


def announce(session: Announced) -> None:
    """Let the other processes load the model of this session too, while rank 0 does.

    Raises:
        InputError: one GPU was named for several processes.
    """
    crew = _post.crew
    if crew is None:
        return
    if session.config.device.startswith("cuda:"):
        raise InputError(
            f"--device {session.config.device} names one GPU for {crew.size} processes; "
            "give --device cuda, and each takes its own"
        )
    _share_memory(crew, session)
    _post.session = session
    # Resolved first: a download or a conversion is then there for the whole machine.
    identity = session.identity
    crew.send(f"model/{crew.node}/{identity['sha256']}", b"1")
    # Resolved too: free memory is no reason for processes to do different things, nor is the speed
    # of one machine's bfloat16.
    stream = "on" if session.streaming else "off"
    config = dataclasses.asdict(session.config.replace(stream=stream, dtype=session.dtype))
    # A launcher with the wrong options starts one process without a word.
    if session.progress is not silent:
        say(f"{crew.size} processes share the measuring")
    _order(crew, {"order": "model", "config": config, "sha256": identity["sha256"]}, {})


def _share_memory(crew: Crew, session: Announced) -> None:
    """Give each process of a machine its part of the memory, where all have the same."""
    from isingcut.models.load import pick_device
    from isingcut.models.streaming.memory import allowance

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", crew.size))
    device = pick_device(session.config.device)
    if device.type != "cuda" and beside > 1 and not session.config.memory_limit:
        found = allowance("", device)
        each = found.used + found.left // beside
        session.config = session.config.replace(memory_limit=f"{each / 1e6:.0f}MB")


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a measurement that all processes carry out.

    The function takes ``replay`` and goes through its micro-batches by `sharing.share`, once.
    Apart from what every process has of its own, its arguments are token sets, arrays or plain
    values. It is shared out only for the model that was announced.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        crew, session = _post.crew, _post.session
        if crew is None or session is None or sharing.current is not None:
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        replay: Any = arguments["replay"]
        device = replay.device
        if session.__dict__.get("replay") is not replay:
            return function(*args, **kwargs)
        name = f"{function.__module__}:{function.__name__}"
        common = {k: v for k, v in arguments.items() if k not in _LOCAL}
        how = {k: getattr(replay, k, None) for k in ("attention", "threads")}
        message = {"order": "task", "function": name, **how}
        number = _order(crew, message, common)
        sharing.current = sharing.Task(crew, f"task/{number}", device)
        try:
            found = function(*args, **kwargs)
        finally:
            sharing.current = None
        # All have read it: they have taken part in the collective that ends the sharing.
        crew.take(f"order/{number}")
        return found

    return call


def _order(crew: Crew, message: dict[str, Any], arguments: dict[str, Any]) -> int:
    """Publish the next order; its number."""
    crew.send(f"order/{_post.orders}", pack(message, arguments))
    _post.orders += 1
    return _post.orders - 1


# The others ---------------------------------------------------------------------------


def _serve(crew: Crew, opened: Opener) -> None:
    """Do what rank 0 orders until it is done."""
    loaded: dict[str, Any] = {}
    while True:
        message, arguments = unpack(crew.wait(f"order/{_post.orders}"))
        _post.orders += 1
        if message["order"] == "done":
            return
        if message["order"] == "model":
            if loaded != message:
                # Freed first: two models may be more than the memory holds.
                _post.session = None
                _post.session, loaded = _load(crew, message, opened), message
        else:
            _take_part(crew, message, arguments)


def _load(crew: Crew, message: dict[str, Any], opened: Opener) -> Announced:
    """The announced model in this process; of those on one machine the first fetches it."""
    session = opened(message["config"])
    fetched = f"model/{crew.node}/{message['sha256']}"
    if crew.local_rank:
        crew.wait(fetched)
    if session.identity["sha256"] != message["sha256"]:
        raise ModelError(
            f"{session.config.model!r} is another model on this machine than on that of rank 0; "
            "give every machine the same files"
        )
    crew.send(fetched, b"1")
    _check_gpu(crew, session.config.device)
    # Loaded now, not at the first measurement.
    _ = session.replay
    return session


def _check_gpu(crew: Crew, device: str) -> None:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", "cuda") and 0 < gpus <= crew.local_rank:
        raise InputError(
            f"this machine has {gpus} GPUs and more processes than that; start one for each GPU "
            f"(--nproc-per-node {gpus}), or all on the CPU (--device cpu)"
        )


def _take_part(crew: Crew, message: dict[str, Any], arguments: dict[str, Any]) -> None:
    module, _, name = message["function"].partition(":")
    assert module.startswith("isingcut."), module
    function = inspect.unwrap(getattr(importlib.import_module(module), name))
    session = _post.session
    assert session is not None
    from isingcut.models.compute.tuning import few_threads

    session.replay.attention = message["attention"]
    sharing.current = sharing.Task(crew, f"task/{_post.orders - 1}", session.replay.device)
    try:
        with suppress(sharing.TaskDone), few_threads(message["threads"]):
            function(session.replay, **arguments)
    finally:
        sharing.current = None
