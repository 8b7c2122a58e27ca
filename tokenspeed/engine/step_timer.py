"""Where the time of a step goes: in the model, or outside of it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.batch import StepTimes


@dataclass(slots=True)
class StepTimer:
    """Sums over the steps since the last `line`. All in seconds.

    `wall` runs from one landing to the next while work is in flight, so `wall − forward` is everything
    that overlap did not hide: loop, control plane, sampling, publishing.
    """

    steps: int = 0
    rows: int = 0
    wall: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    plan: float = 0.0
    commit: float = 0.0
    publish: float = 0.0
    _landed: float | None = None

    def launched(self, now: float) -> None:
        """A step was launched while nothing was in flight: its wall time starts now."""
        if self._landed is None:
            self._landed = now

    def landed(self, now: float, rows: int, times: StepTimes, *, more: bool) -> float:
        """A step was committed and published; `more` tells if another one is in flight. Gives its wall time."""
        wall = now - self._landed if self._landed is not None else 0.0
        self.wall += wall
        self._landed = now if more else None
        self.steps += 1
        self.rows += rows
        self.forward += times.forward
        self.sample += times.sample
        return wall

    def line(self) -> str | None:
        """One line for the log and a fresh start; None if nothing ran."""
        if self.steps == 0:
            return None
        n = self.steps

        def ms(seconds: float) -> str:
            return f"{seconds / n * 1e3:.2f}"

        outside = max(self.wall - self.forward, 0.0)
        share = 100 * outside / self.wall if self.wall > 0 else 0.0
        text = (
            f"{n} steps of {self.rows / n:.1f} rows: {ms(self.wall)} ms a step, model {ms(self.forward)}, "
            f"outside the model {ms(outside)} ms ({share:.1f}%); sample {ms(self.sample)}, plan {ms(self.plan)}, "
            f"commit {ms(self.commit)}, publish {ms(self.publish)}"
        )
        landed = self._landed
        self.__init__()  # type: ignore[misc]
        self._landed = landed
        return text
