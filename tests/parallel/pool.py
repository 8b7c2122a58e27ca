"""Processes that are the ranks of any mesh, one after the other: started once for a module of tests, as each takes a
while."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.world import World

PATIENCE = 120.0
"""Seconds after which a job counts as hanging."""

Job = Callable[..., Any]


class Pool:
    """`size` processes. Jobs are functions of a module, their arguments and results what pickle takes."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.jobs", "tests.models.rank_jobs"])
        pairs = [context.Pipe() for _ in range(size)]
        self._ends = [here for here, _ in pairs]
        self._processes = [context.Process(target=_serve, args=(there,), daemon=True) for _, there in pairs]
        for process, (_, there) in zip(self._processes, pairs, strict=True):
            process.start()
            there.close()

    def over(self, mesh: Mesh, job: Job, *arguments: Any) -> list[Any]:
        """What `job(world, *arguments)` gives on each rank of `mesh`. Fails with what it raised on the first."""
        self.send_over(mesh, job, *arguments)
        return self._answers(mesh.world)

    def each(self, job: Job, *arguments: tuple[Any, ...]) -> list[Any]:
        """`job` with each of these arguments, in a process each, at the same time."""
        for end, given in zip(self._ends, arguments, strict=False):
            end.send((job, given))
        return self._answers(len(arguments))

    def send_over(self, mesh: Mesh, job: Job, *arguments: Any) -> None:
        """Begin `job(world, *arguments)` on each rank of `mesh`."""
        port = free_port()
        for rank, end in zip(range(mesh.world), self._ends, strict=False):
            end.send((_in_world, (mesh, rank, port, job, arguments)))

    def answer(self, place: int) -> Any:
        """What one process answers."""
        assert self._ends[place].poll(PATIENCE), f"process {place} has not answered in {PATIENCE:g} s"
        good, result = self._ends[place].recv()
        assert good, f"process {place}:\n{result}"
        return result

    def _answers(self, count: int) -> list[Any]:
        """Of all, before any of them fails a test: those behind it would answer the next job."""
        ends = self._ends[:count]
        late = [place for place, end in enumerate(ends) if not end.poll(PATIENCE)]
        assert not late, f"processes {late} have not answered in {PATIENCE:g} s"
        answers = [end.recv() for end in ends]
        for place, (good, result) in enumerate(answers):
            assert good, f"process {place}:\n{result}"
        return [result for _, result in answers]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def started(size: int) -> Iterator[Pool]:
    pool = Pool(size)
    try:
        yield pool
    finally:
        pool.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _serve(end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            job, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((True, job(*arguments)))
        except Exception:  # whatever a job raises is its test's to see
            end.send((False, traceback.format_exc()))


def _in_world(mesh: Mesh, rank: int, port: int, job: Job, arguments: tuple[Any, ...]) -> Any:
    world = World.join(mesh, rank, torch.device("cpu"), address="127.0.0.1", port=port, timeout=60)
    try:
        return job(world, *arguments)
    finally:
        world.leave()
