"""The cheapest way from one layout to another: a shortest path over all legal transfers."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from dataclasses import dataclass

from tokenspeed.parallel.cost import Hardware
from tokenspeed.parallel.layout import Layout
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import AllReduce, Planned, Transfer, X, moves_from


@dataclass(frozen=True, slots=True)
class Route:
    """Transfers one after the other, and what they take together."""

    seconds: float
    steps: tuple[Planned, ...]

    @property
    def ends_in_all_reduce(self) -> bool:
        return bool(self.steps) and isinstance(self.steps[-1].step, AllReduce)

    def of(self, tensor: str) -> Route:
        """The same for another tensor."""
        moves = ((planned, planned.step) for planned in self.steps)
        named = (
            dataclasses.replace(planned, step=dataclasses.replace(step, tensor=tensor))
            for planned, step in moves
            if isinstance(step, Transfer)
        )
        return Route(self.seconds, tuple(named))


class Routes:
    """Finds routes over one mesh, each once."""

    def __init__(self, mesh: Mesh, hardware: Hardware) -> None:
        self._mesh, self._hardware = mesh, hardware
        self._known: dict[tuple[Layout, Layout, int, int, float], Route | None] = {}

    def find(
        self, start: Layout, end: Layout, tensor: str, tokens: int, row_bytes: int, *, saved: float = 0.0
    ) -> Route | None:
        """The cheapest route, of equals one with the fewest steps; None if there is none.

        `saved` seconds are what a norm behind it gains if it ends in an all-reduce, which then takes less time itself.
        """
        key = (start, end, tokens, row_bytes, saved)
        if key not in self._known:
            self._known[key] = self._search(start, end, tokens, row_bytes, saved)
        route = self._known[key]
        return route if route is None or tensor == X else route.of(tensor)

    def _search(self, start: Layout, end: Layout, tokens: int, row_bytes: int, saved: float) -> Route | None:
        order = itertools.count()
        queue: list[tuple[float, int, int, Layout, bool, tuple[Planned, ...]]] = [
            (0.0, 0, next(order), start, False, ())
        ]
        done: set[tuple[Layout, bool]] = set()
        found: list[Route] = []
        while queue:
            seconds, length, _, layout, reduced, steps = heapq.heappop(queue)
            if (layout, reduced) in done:
                continue
            done.add((layout, reduced))
            if layout == end:
                found.append(Route(seconds, steps))
            for transfer in moves_from(layout, X):
                planned = self._planned(transfer, layout, tokens, row_bytes)
                after, ends = transfer.applied(layout), isinstance(transfer, AllReduce)
                if (after, ends) not in done:
                    total = seconds + planned.seconds
                    heapq.heappush(queue, (total, length + 1, next(order), after, ends, (*steps, planned)))

        def cost(route: Route) -> tuple[float, int]:
            gain = saved + self._gain(route, end, tokens, row_bytes) if saved else 0.0
            return route.seconds - gain * route.ends_in_all_reduce, len(route.steps)

        return min(found, key=cost, default=None)

    def _gain(self, route: Route, end: Layout, tokens: int, row_bytes: int) -> float:
        """What the all-reduce at its end takes less with a norm behind it."""
        last = route.steps[-1] if route.steps else None
        if last is None or not isinstance(last.step, AllReduce):
            return 0.0
        before = end.with_letter(last.step.first, last.step.stop, AllReduce.before)
        return last.seconds - self._hardware.reduced_seconds(last.step, before, self._mesh, tokens, row_bytes)

    def _planned(self, transfer: Transfer, layout: Layout, tokens: int, row_bytes: int) -> Planned:
        arguments = (transfer, layout, self._mesh, tokens, row_bytes)
        return Planned(transfer, self._hardware.sent(*arguments), self._hardware.seconds(*arguments))
