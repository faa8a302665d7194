"""What a request asks for beside its object: the options of writes and deletes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class WriteOptions:
    """The options of a create, update, patch or apply."""

    dry_run: bool = False
    field_validation: str = "Warn"  # Ignore, Warn, Strict
    warnings: list[str] = field(default_factory=list)  # filled by the write
    duplicates: list[str] = field(default_factory=list)  # duplicate keys in the body
    manager: str = "unknown"  # the field manager
    force: bool = False  # for an apply: take over fields that others own


@dataclass(slots=True)
class DeleteOptions:
    """The options of a delete: grace period, preconditions and propagation policy."""

    grace_s: int | None = None
    uid: str | None = None
    resource_version: str | None = None
    propagation: str | None = None  # Background, Foreground, Orphan
    dry_run: bool = False
