"""Keeps the usage of all KubeAI replicas in ConfigMaps.

Each adds what its own workers have reported. A write that conflicts with a peer's is repeated
on what was read again. One whose outcome is unknown is not repeated before the ConfigMap has been
read: it may have been made; see :mod:`.shards`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from kubeai.api.usage import USAGE_SELECTOR, KeyUsage
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS
from kubeai.logs import get_logger
from kubeai.supervisor.usage.ledger import UsageLedger
from kubeai.supervisor.usage.shards import SHARDS_MAX, ConfigMap, Shard, Shards

log = get_logger(__name__)

ATTEMPTS_MAX = 5  # of a write, until the next flush
TOO_LARGE = (413, 422)  # statuses of the API for a ConfigMap of more than 1 MiB
RETENTION_DAYS = 90  # of keys and Models that do not exist, after their last request


def day_of(time_s: float) -> str:
    """The UTC day of a Unix time: YYYY-MM-DD."""
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


class UsageStore:
    """Adds to the ConfigMaps what is pending in a ledger."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        ledger: UsageLedger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``identity``: of this KubeAI replica. ``clock``: Unix time."""
        self._kube = kube
        self._namespace = namespace
        self._ledger = ledger
        self._clock = clock
        # A process that starts again numbers its writes from 1.
        self._writer = f"{identity[:48]}-{secrets.token_hex(4)}"
        self._shards = Shards()
        self._loaded = False
        self.failures = 0  # flushes that have left something

    async def flush(self) -> bool:
        """Write everything that is pending; False if something is left, after logging why."""
        done = False
        try:
            done = await self._flush()
        except ApiError as error:
            log.warning("usage not stored", status=error.status, error=str(error))
        except Exception:
            log.exception("usage not stored")
        self.failures += not done
        return done

    async def _flush(self) -> bool:
        if not self._ledger.has_pending and not any(shard.write for shard in self._shards):
            return True
        await self._load()
        # The writes that the last flush has left come first: their numbers are lower.
        done = await self._write_all()
        added, left = self._shards.assign(self._ledger.take())
        if left:
            log.error("no room for the usage of keys", keys=len(left), config_maps=SHARDS_MAX)
        for shard, usage in added.items():
            if shard.write is None:
                shard.begin_write(usage)
            else:
                self._ledger.put_back(usage)
        return await self._write_all() and done and not left

    async def _load(self) -> None:
        if not self._loaded:
            found, _ = await self._kube.list(
                CONFIGMAPS, self._namespace, labels=USAGE_SELECTOR, type=ConfigMap
            )
            self._shards.load(found)
            self._loaded = True

    async def _write_all(self) -> bool:
        done = True
        for shard in self._shards:
            if shard.write is not None:
                done = await self._write(shard) and done
        return done

    async def _write(self, shard: Shard) -> bool:
        """Make a shard's write; False if that is left to the next flush."""
        for _ in range(ATTEMPTS_MAX):
            try:
                if shard.is_stale:
                    await self._read(shard)
                    if shard.has_write(self._writer):
                        shard.write = None
                        return True
                await self._write_once(shard)
                return True
            except ApiError as error:
                if error.status in TOO_LARGE:
                    self._ledger.put_back(self._shards.give_up(shard))
                if error.status not in (404, 409):
                    log.warning(
                        "usage not stored",
                        config_map=shard.name,
                        status=error.status,
                        error=str(error),
                    )
                    return False
        return False

    async def _write_once(self, shard: Shard) -> None:
        now_s = self._clock()
        body = shard.body(self._writer, now_s)
        shard.is_stale = True  # unless it succeeds; the call may also be cancelled
        if shard.version:
            kept = await self._kube.patch(
                CONFIGMAPS, shard.name, body, self._namespace, type=ConfigMap
            )
        else:
            kept = await self._kube.create(CONFIGMAPS, body, self._namespace, type=ConfigMap)
        shard.wrote(kept.metadata.resource_version, self._writer, now_s)

    async def _read(self, shard: Shard) -> None:
        try:
            found = await self._kube.get(CONFIGMAPS, shard.name, self._namespace, type=ConfigMap)
        except ApiError as error:
            if error.status != 404:
                raise
            shard.take(None)  # somebody has deleted it, to reset the counts
            return
        shard.take(found)
        self._shards.note(shard)

    async def tidy(self, keys: set[str], models: set[str]) -> None:
        """Forget the usage of other keys and Models, RETENTION_DAYS after their last request."""
        try:
            await self._load()
            oldest = datetime.fromtimestamp(self._clock(), UTC) - timedelta(days=RETENTION_DAYS)
            gone = self._shards.obsolete(keys, models, oldest.date().isoformat())
            for shard, usage in gone.items():
                if shard.write is None and not shard.is_stale:
                    await self._forget(shard, usage)
        except ApiError as error:  # the next time
            log.info("old usage not removed", status=error.status, error=str(error))
        except Exception:
            log.exception("old usage not removed")

    async def _forget(self, shard: Shard, gone: dict[str, KeyUsage | None]) -> None:
        body = shard.forget(gone)
        shard.is_stale = True  # unless it succeeds
        kept = await self._kube.patch(CONFIGMAPS, shard.name, body, self._namespace, type=ConfigMap)
        shard.forgot(kept.metadata.resource_version, gone)
        self._shards.forgot(gone)
        log.info("old usage removed", config_map=shard.name, keys=len(gone))
