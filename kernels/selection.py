"""Which implementation of an op runs: the one that is forced, or the fastest that `tune` has measured, or the highest
priority that is legal here.

Selection happens while a model is built. `TOKENSPEED_KERNELS="mha_decode=reference,rms_norm=cpu"` forces
backends (or one variant: `mha_decode=cpu:avx2`); a name that does not exist or may not run here is an
error, never ignored.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from tokenspeed.kernels.forms import PANELS, ROWS
from tokenspeed.kernels.registry import OPS, Implementation, Kernel, Registry, SelectionError, Target, Traits, parts_of
from tokenspeed.kernels.winners import Winner, Winners, by_tokens

ENVIRONMENT = "TOKENSPEED_KERNELS"
ENTRY_POINT_GROUP = "tokenspeed.kernels"
NO_BACKEND = "numerics"
"""The one folder of this package that is not a backend."""

logger = logging.getLogger("tokenspeed.kernels")


@dataclass(frozen=True)
class Plugin:
    """One entry point of the group: its name and module, what it added, or why it was skipped."""

    name: str
    module: str
    num_implementations: int
    failure: str | None


@dataclass(frozen=True)
class Verdict:
    """What selection thinks of one implementation.

    `reasons` say why it is illegal (empty: legal). `conditions` are restrictions on traits that the
    caller left open (only when explaining).
    """

    implementation: Implementation
    reasons: tuple[str, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The choice for one request, with a verdict on everything considered, best first.

    `forced` is the name that the environment asks for. `chosen` is what forcing and priority choose, None when
    nothing may run; `winners` are what runs instead where that was measured, by number of tokens.
    """

    op: str
    target: Target
    traits: Traits
    forced: str | None
    chosen: Implementation | None
    winners: tuple[Winner, ...]
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [self._request()]
        if self.forced is not None:
            lines.append(f"forced by {ENVIRONMENT}: {self.forced}")
        if self.winners:
            lines.append(f"measured: {', '.join(map(str, self.winners))}")
        for verdict in self.verdicts:
            lines.append(f"  {self._word(verdict):9}{verdict.implementation.name:16}{_detail(verdict)}")
        return "\n".join(lines)

    def runs(self, verdict: Verdict) -> bool:
        """Whether it is what runs, for some number of tokens at least."""
        if self.winners:
            return not verdict.reasons and verdict.implementation.name in {winner.name for winner in self.winners}
        return verdict.implementation is self.chosen

    def refusal(self) -> str:
        """Why nothing may run, in one line: why not the forced one, or why not each."""
        reasons = [
            f"{verdict.implementation.name} {' and '.join(verdict.reasons)}"
            for verdict in self.verdicts
            if self.forced is None or self.forced in (verdict.implementation.name, verdict.implementation.backend)
        ]
        who = "no kernel can" if self.forced is None else f"{ENVIRONMENT}: {self.op}={self.forced} cannot"
        return f"{who} run {self._request()}: {'; '.join(reasons)}"

    def _request(self) -> str:
        traits = "".join(f", {name}={value}" for name, value in self.traits.items())
        return f"{self.op} on {self.target.platform}, {str(self.target.dtype).removeprefix('torch.')}{traits}"

    def _word(self, verdict: Verdict) -> str:
        if self.runs(verdict):
            return "chosen"
        return "rejected" if verdict.reasons else "legal"


def _detail(verdict: Verdict) -> str:
    parts = [f"priority {verdict.implementation.priority}", *verdict.reasons]
    parts += [f"if {condition}" for condition in verdict.conditions]
    return "; ".join(parts)


class Selector:
    """Chooses among the declarations of one registry, by what was measured where there is such."""

    def __init__(self, registry: Registry, plugins: tuple[Plugin, ...] = (), winners: Winners | None = None) -> None:
        self.registry = registry
        self.plugins = plugins
        self.winners = winners

    def explain(self, op: str, target: Target, traits: Traits, forced: Mapping[str, str] | None = None) -> Explanation:
        """Judge every implementation of `op`. Traits left out are conditions, not refusals.

        `forced` maps ops to backends or `backend:variant`; None reads the environment. Raises
        `SelectionError` when `op` or anything forced does not exist.
        """
        forced = self.forced(os.environ.get(ENVIRONMENT, "")) if forced is None else forced
        if op not in OPS:
            raise SelectionError(f"unknown op {op!r}; ops are {', '.join(OPS)}")
        unknown = sorted(set(traits) - set(OPS[op]))
        if unknown:
            raise SelectionError(f"{op} has no trait {', '.join(unknown)}; it has {', '.join(OPS[op]) or 'none'}")
        wanted = forced.get(op)
        parts = [] if wanted else [part for part in parts_of(op) if part in forced]
        verdicts = [_judge(each, target, traits, wanted, parts) for each in self.registry.of(op)]
        verdicts.sort(key=lambda verdict: (bool(verdict.reasons), -verdict.implementation.priority))
        chosen = verdicts[0].implementation if verdicts and not verdicts[0].reasons else None
        winners = () if wanted or self.winners is None else self.winners.find(op, target, traits)
        legal = {verdict.implementation.name for verdict in verdicts if not verdict.reasons}
        if any(winner.name not in legal for winner in winners):
            winners = ()
        return Explanation(op, target, traits, wanted, chosen, winners, tuple(verdicts))

    def choose(self, op: str, target: Target, traits: Traits) -> Explanation:
        """The explanation of a choice that there is, or `SelectionError` with every reason in one line."""
        missing = sorted(set(OPS.get(op, ())) - set(traits))
        if missing:
            raise SelectionError(f"{op} needs the traits {', '.join(missing)}")
        explanation = self.explain(op, target, traits)
        if explanation.chosen is None:
            raise SelectionError(explanation.refusal())
        return explanation

    def select(self, op: str, target: Target, traits: Traits) -> Kernel:
        """The bound callable of the winner where `tune` has measured, else of the best legal implementation. Raises
        `SelectionError` as `choose` does."""
        explanation = self.choose(op, target, traits)
        logger.debug("%s", explanation)
        running = [verdict.implementation for verdict in explanation.verdicts if explanation.runs(verdict)]
        kernels = {implementation.name: implementation.bind(target, traits) for implementation in running}
        winners = explanation.winners or (Winner(None, running[0].name),)
        return by_tokens([(winner.most_tokens, kernels[winner.name]) for winner in winners])

    def plain_form(self, target: Target, forced: Mapping[str, str] | None = None) -> str:
        """`panels` or `rows`, as the function of this name says. `forced` as in `explain`."""
        forced = self.forced(os.environ.get(ENVIRONMENT, "")) if forced is None else forced
        if not {"linear", "lm_head", "embedding"}.isdisjoint(forced):
            return ROWS
        rows = self.explain("linear", target, {}, forced).chosen
        panels = self.explain("packed_linear", target, {"matrix_form": PANELS}, forced).chosen
        better = panels is not None and (rows is None or panels.priority > rows.priority)
        return PANELS if better else ROWS

    def forced(self, setting: str) -> dict[str, str]:
        """Parse and check "op=backend,op=backend:variant"."""
        forced: dict[str, str] = {}
        for item in filter(None, (part.strip() for part in setting.split(","))):
            op, equals, name = (part.strip() for part in item.partition("="))
            if not equals or not name:
                raise SelectionError(f"{ENVIRONMENT}: {item!r} is not of the form op=backend")
            if op not in OPS:
                raise SelectionError(f"{ENVIRONMENT}: unknown op {op!r}; ops are {', '.join(OPS)}")
            if op in forced:
                raise SelectionError(f"{ENVIRONMENT}: {op} is forced twice")
            names = {known for each in self.registry.of(op) for known in (each.backend, each.name)}
            if name not in names:
                raise SelectionError(f"{ENVIRONMENT}: {op} has no backend {name!r}; it has {', '.join(sorted(names))}")
            forced[op] = name
        return forced


def _judge(
    implementation: Implementation, target: Target, traits: Traits, wanted: str | None, forced_parts: Sequence[str]
) -> Verdict:
    reasons: list[str] = []
    if wanted is not None and wanted not in (implementation.backend, implementation.name):
        reasons.append(f"{wanted} is forced")
    if forced_parts and not implementation.selects_parts:
        reasons.append(f"its own {', '.join(forced_parts)} instead of the forced one")
    elsewhere = [on.rejects(target.platform) for on in implementation.platforms]
    if all(elsewhere):
        reasons.append(" or ".join(filter(None, elsewhere)))
    if implementation.dtypes is not None and target.dtype not in implementation.dtypes:
        reasons.append(f"does not take {str(target.dtype).removeprefix('torch.')}")
    conditions: list[str] = []
    for name, condition in implementation.traits.items():
        if name not in traits:
            conditions.append(f"{name} is {condition}")
        elif not condition.allows(traits[name]):
            reasons.append(f"{name}={traits[name]} is not {condition}")
    if not reasons and (unavailable := implementation.unavailable()) is not None:
        reasons.append(unavailable)
    return Verdict(implementation, tuple(reasons), tuple(conditions))


@functools.cache
def default() -> Selector:
    """The selector of this process: the backends of this package, then the installed plug-ins."""
    registry = Registry()
    package = importlib.import_module("tokenspeed.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg and module.name != NO_BACKEND:
            registry.add(importlib.import_module(f"{package.__name__}.{module.name}").implementations())
    return Selector(registry, load_plugins(registry), Winners.of_user())


def plain_form(target: Target) -> str:
    """The form in which matrices of plain numbers are best kept for this target: panels where the product with them is
    declared better than the one with rows, and nobody forces the latter."""
    return default().plain_form(target)


def load_plugins(registry: Registry) -> tuple[Plugin, ...]:
    """Add what the entry points of the group `tokenspeed.kernels` declare.

    Each names a function without arguments that returns `Implementation`s. One that fails is named in
    a warning, adds nothing, and does not stop the others.
    """
    plugins = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            count, failure = registry.add(_checked(entry.load()())), None
        except Exception as error:  # another party's code: any failure of it is a plug-in that is not there
            count, failure = 0, f"{type(error).__name__}: {error}"
        plugin = Plugin(entry.name, entry.module, count, failure)
        if failure is None:
            logger.info("kernel plug-in %s (%s): %d implementations", plugin.name, plugin.module, count)
        else:
            logger.warning("kernel plug-in %s (%s) is skipped: %s", plugin.name, plugin.module, failure)
        plugins.append(plugin)
    return tuple(plugins)


def _checked(declared: Iterable[object]) -> Iterable[Implementation]:
    for each in declared:
        if not isinstance(each, Implementation):
            raise TypeError(f"expected Implementation, got {type(each).__name__}")
        yield each


def select(op: str, target: Target, **traits: int | bool | str) -> Kernel:
    """The bound callable that `ops` hands to a layer."""
    return default().select(op, target, traits)
