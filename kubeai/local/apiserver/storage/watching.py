"""Lists and watches: pages of a collection, and its events from a revision on."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.storage.selectors import Match
from kubeai.local.apiserver.storage.store import Event, Expired, Store, Stored

Object = dict[str, Any]

BOOKMARK_S = 30.0
_TOO_OLD = "The provided continue parameter is too old to display a consistent list result."


@dataclass(slots=True)
class ListOptions:
    """The query of a list or watch."""

    namespace: str = ""
    match: Match | None = None
    limit: int = 0
    continue_: str = ""
    resource_version: str = ""
    version_match: str = ""  # "", Exact, NotOlderThan
    timeout_s: float = 0.0
    bookmarks: bool = False
    initial_events: bool = False


class Page(NamedTuple):
    """A page of a list, and the list's metadata."""

    items: list[Stored]
    metadata: Object


def revision_of(text: str) -> int:
    """Parse a resourceVersion; 0 if it is empty. Raises a 400."""
    if not text.isdecimal() and text:
        raise errors.bad_request(f'resourceVersion: Invalid value: "{text}": must be a number')
    return int(text or 0)


def _check_not_ahead(store: Store, revision: int) -> None:
    if revision > store.revision:
        message = f"Timeout: Too large resource version: {revision}, current: {store.revision}"
        cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
        details = {"causes": [cause], "retryAfterSeconds": 1}
        raise StatusError(504, "Timeout", message, details)


def list_page(store: Store, resource: Resource, options: ListOptions) -> Page:
    """Return one page of a list. All pages of a list show the same revision."""
    revision, start = store.revision, ("", "")
    requested = revision_of(options.resource_version)
    if options.continue_:
        revision, start = _decode_continue(options.continue_)
    elif options.version_match == "Exact":
        _check_not_ahead(store, requested)
        revision = requested
    else:
        _check_not_ahead(store, requested)
    try:
        items = (
            store.items(resource.key, options.namespace)
            if revision == store.revision
            else store.items_at(resource.key, revision, options.namespace)
        )
    except Expired:
        raise errors.expired(_TOO_OLD) from None
    if options.match is not None:
        items = [stored for stored in items if options.match(stored.object)]
    if options.continue_:
        items = [stored for stored in items if _place(stored) > start]
    metadata: Object = {"resourceVersion": str(revision)}
    if options.limit and len(items) > options.limit:
        left = len(items) - options.limit
        items = items[: options.limit]
        metadata["continue"] = _encode_continue(revision, _place(items[-1]))
        if options.match is None:
            metadata["remainingItemCount"] = left
    return Page(items, metadata)


def _place(stored: Stored) -> tuple[str, str]:
    return stored.metadata.get("namespace", ""), stored.metadata["name"]


def _encode_continue(revision: int, start: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([revision, *start])).decode()


def _decode_continue(token: str) -> tuple[int, tuple[str, str]]:
    try:
        revision, namespace, name = orjson.loads(base64.urlsafe_b64decode(token))
        return int(revision), (str(namespace), str(name))
    except (binascii.Error, ValueError, TypeError):
        raise errors.bad_request(f"continue key is not valid: {token!r}") from None


class WatchEvent(NamedTuple):
    """One event of a watch. `object` is partial for BOOKMARK, and a Status for ERROR."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: Object
    stored: Stored | None = None  # if set, its JSON is reused


def check_start(store: Store, options: ListOptions) -> None:
    """Raise the errors that reject a watch before it starts."""
    _check_not_ahead(store, revision_of(options.resource_version))


async def watch(
    store: Store, resource: Resource, options: ListOptions, stop: asyncio.Event
) -> AsyncGenerator[WatchEvent]:
    """Yield events until the timeout, until `stop` is set, or until the client is too far behind.

    There is no queue per client, only a position in the window of recent events. A slow client
    whose position has left the window gets an error. After setting `stop`, call `store.notify_all`.
    """
    revision = revision_of(options.resource_version)
    changed = asyncio.Event()
    unsubscribe = store.subscribe(resource.key, changed)
    try:
        at = revision
        if options.initial_events or revision == 0:
            at = store.revision
            for stored in store.items(resource.key, options.namespace):
                if options.match is None or options.match(stored.object):
                    yield WatchEvent("ADDED", stored.object, stored)
            if options.initial_events and options.bookmarks:
                yield _bookmark(resource, at, initial=True)
        async for watch_event in _follow(store, resource, options, at, changed, stop):
            yield watch_event
    except Expired:
        old = errors.expired(f"too old resource version: {revision} ({store.revision})")
        yield WatchEvent("ERROR", old.body())
    finally:
        unsubscribe()


async def _follow(
    store: Store,
    resource: Resource,
    options: ListOptions,
    at: int,
    changed: asyncio.Event,
    stop: asyncio.Event,
) -> AsyncGenerator[WatchEvent]:
    loop = asyncio.get_running_loop()
    end = loop.time() + options.timeout_s
    while not stop.is_set():
        changed.clear()
        now = store.revision
        for event in store.since(resource.key, at):
            at = event.revision
            watch_event = _watch_event(event, options)
            if watch_event is not None:
                yield watch_event
        if changed.is_set():
            continue  # there are new events already
        at = max(at, now)  # skip revisions of other resources
        left = end - loop.time()
        try:
            async with asyncio.timeout(max(0.0, min(left, BOOKMARK_S))):
                await changed.wait()
        except TimeoutError:
            if options.bookmarks:
                yield _bookmark(resource, at)
            if loop.time() >= end:
                return


def _bookmark(resource: Resource, revision: int, initial: bool = False) -> WatchEvent:
    metadata: Object = {"resourceVersion": str(revision), "creationTimestamp": None}
    if initial:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return WatchEvent(
        "BOOKMARK",
        {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata},
    )


def _watch_event(event: Event, options: ListOptions) -> WatchEvent | None:
    """Return the event as the client sees it. Leaving the selection counts as a deletion."""
    if options.namespace and event.key[0] != options.namespace:
        return None
    match = options.match
    before = event.old is not None and (match is None or match(event.old.object))
    after = event.new is not None and (match is None or match(event.new.object))
    if after:
        assert event.new is not None
        return WatchEvent("MODIFIED" if before else "ADDED", event.new.object, event.new)
    if not before:
        return None
    if event.new is None:
        return WatchEvent("DELETED", event.last.object, event.last)
    assert event.old is not None
    metadata = {**event.old.metadata, "resourceVersion": str(event.revision)}
    return WatchEvent("DELETED", {**event.old.object, "metadata": metadata})
