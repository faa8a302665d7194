"""Which Model each alias belongs to, and which fallbacks and canaries count. Pure.

A name belongs to one Model: in this order, the Model with that name, the Model with that adapter
(``<model>_<adapter>``), or the oldest Model that lists it as an alias. An entry of ``fallbacks``,
or a ``canary``, does not count if it names its own Model, or if it leads from a younger to an older
Model of a cycle; so no cycle is left. One that names no Model is reported, and counts as soon as
there is such a Model.

:class:`Names` follows all Models. The operator of every KubeAI replica feeds it and publishes the
result, and the leader writes it to the Models' conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime

import msgspec

from kubeai.api.model import Model

_FIRST = datetime.min.replace(tzinfo=UTC)


class Ignored(msgspec.Struct, frozen=True):
    """An alias or a reference that does not count, and why."""

    reason: str  # one word, as in the Model's conditions
    message: str


class ResolvedNames(msgspec.Struct, frozen=True):
    """A Model's aliases and references that count, and the others.

    References that name no Model are among both.
    """

    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    canary: str = ""
    ignored_aliases: tuple[Ignored, ...] = ()
    ignored_references: tuple[Ignored, ...] = ()


NO_NAMES = ResolvedNames()


class _Entry(msgspec.Struct, frozen=True):
    """The part of a Model that names depend on."""

    age: tuple[datetime, str]  # its creation; those of the same second are ordered by name
    adapters: tuple[str, ...]
    aliases: tuple[str, ...]
    fallbacks: tuple[str, ...]
    canary: str

    @property
    def canaries(self) -> tuple[str, ...]:
        return (self.canary,) if self.canary else ()


class Names:
    """The names of all Models in the namespace."""

    def __init__(self) -> None:
        self._seen: dict[str, Model] = {}  # as last observed
        self._entries: dict[str, _Entry] = {}
        self._claimants: dict[str, set[str]] = {}  # alias → the Models that list it
        self._referrers: dict[str, set[str]] = {}  # Model → those with it as fallback or canary

    def begin(self, models: Mapping[str, Model]) -> None:
        """Load all Models. Call once, before ``observe``."""
        for name, model in models.items():
            self._seen[name] = model
            self._replace(name, None, _entry(model))

    def observe(self, name: str, model: Model | None) -> set[str]:
        """Record a Model's state (None: it was deleted); return the other Models that it affects.

        A Model that is being deleted has no names. Does nothing if only the Model's pods changed.
        """
        if self._seen.get(name) is model:
            return set()
        if model is None:
            del self._seen[name]
        else:
            self._seen[name] = model
        old, new = self._entries.get(name), _entry(model)
        if old == new:
            return set()
        affected = self._dependents(name, old)
        self._replace(name, old, new)
        affected |= self._dependents(name, new)
        if old is None or new is None or old.age != new.age:
            affected |= self._referrers.get(name, set())
        affected.discard(name)
        return affected

    def resolve(self, name: str) -> ResolvedNames:
        """A Model's names and references; none if it does not exist."""
        entry = self._entries.get(name)
        if entry is None or not (entry.aliases or entry.fallbacks or entry.canary):
            return NO_NAMES
        conflicts = {alias: self._conflict(name, alias) for alias in entry.aliases if alias != name}
        fallbacks = self._references(name, "fallbacks", lambda one: one.fallbacks)
        canaries = self._references(name, "canary", lambda one: one.canaries)
        return ResolvedNames(
            aliases=tuple(alias for alias, conflict in conflicts.items() if conflict is None),
            fallbacks=tuple(model for model, _, counts in fallbacks if counts),
            canary=next((model for model, _, counts in canaries if counts), ""),
            ignored_aliases=tuple(one for one in conflicts.values() if one is not None),
            ignored_references=tuple(
                problem for _, problem, _ in (*fallbacks, *canaries) if problem is not None
            ),
        )

    def _conflict(self, name: str, alias: str) -> Ignored | None:
        """Why an alias that a Model lists does not belong to it."""
        model, _, adapter = alias.partition("_")
        oldest = min(self._claimants[alias], key=lambda one: self._entries[one].age)
        if alias in self._entries:
            why = "it is the name of a Model"
        elif adapter and model in self._entries and adapter in self._entries[model].adapters:
            why = f"it is the adapter {adapter!r} of the Model {model!r}"
        elif oldest != name:
            why = f"it belongs to the Model {oldest!r}, which is older"
        else:
            return None
        return Ignored("Conflict", f"the alias {alias!r} is ignored: {why}")

    def _references(
        self, name: str, field: str, of: Callable[[_Entry], Iterable[str]]
    ) -> list[tuple[str, Ignored | None, bool]]:
        """(other Model, problem, whether it counts) for each reference of a field."""
        entry = self._entries[name]
        cycle = self._cycle(name, of)
        found: list[tuple[str, Ignored | None, bool]] = []
        for other in dict.fromkeys(of(entry)):
            what = f"{field}: {other!r} is ignored: "
            if other == name:
                problem = Ignored("SelfReference", what + "it is this Model itself")
            elif other not in self._entries:
                missing = Ignored("NotFound", what + "there is no such Model")
                found.append((other, missing, True))
                continue
            elif other in cycle and self._entries[other].age < entry.age:
                why = "it leads back to this Model, and in a cycle only entries that name younger "
                problem = Ignored("Cycle", f"{what}{why}Models count")
            else:
                found.append((other, None, True))
                continue
            found.append((other, problem, False))
        return found

    def _cycle(self, name: str, of: Callable[[_Entry], Iterable[str]]) -> set[str]:
        """The Models that a Model leads to and that lead back to it."""
        led_from: dict[str, set[str]] = {}

        def leads_to(model: str) -> Iterable[str]:
            entry = self._entries.get(model)
            return () if entry is None else of(entry)

        for model in _walk(name, leads_to):
            for other in leads_to(model):
                led_from.setdefault(other, set()).add(model)
        return set(_walk(name, lambda model: led_from.get(model, ())))

    def _dependents(self, name: str, entry: _Entry | None) -> set[str]:
        """The Models whose names or references may depend on this state of a Model."""
        if entry is None:
            return set()
        names = (name, *entry.aliases, *(f"{name}_{adapter}" for adapter in entry.adapters))
        found = {model for one in names for model in self._claimants.get(one, ())}
        if name in self._entries:
            found |= self._cycle(name, lambda one: one.fallbacks)
            found |= self._cycle(name, lambda one: one.canaries)
        return found

    def _replace(self, name: str, old: _Entry | None, new: _Entry | None) -> None:
        if old is not None:
            _discard(self._claimants, old.aliases, name)
            _discard(self._referrers, (*old.fallbacks, *old.canaries), name)
            del self._entries[name]
        if new is not None:
            self._entries[name] = new
            for alias in new.aliases:
                self._claimants.setdefault(alias, set()).add(name)
            for model in (*new.fallbacks, *new.canaries):
                self._referrers.setdefault(model, set()).add(name)


def _entry(model: Model | None) -> _Entry | None:
    if model is None or model.metadata.deletion_timestamp is not None:
        return None
    meta, spec = model.metadata, model.spec
    return _Entry(
        age=(meta.creation_timestamp or _FIRST, meta.name),
        adapters=tuple(adapter.name for adapter in spec.adapters),
        aliases=spec.aliases,
        fallbacks=spec.fallbacks,
        canary=spec.canary.model if spec.canary is not None else "",
    )


def _walk(start: str, neighbours: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """A Model and all that it is connected to, each once."""
    seen, waiting = {start}, [start]
    while waiting:
        model = waiting.pop()
        yield model
        for other in neighbours(model):
            if other not in seen:
                seen.add(other)
                waiting.append(other)


def _discard(index: dict[str, set[str]], keys: Iterable[str], name: str) -> None:
    for key in keys:
        models = index.get(key)
        if models is not None:
            models.discard(name)
            if not models:
                del index[key]
