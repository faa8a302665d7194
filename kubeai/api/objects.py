"""What the Model resource shares with every Kubernetes object: metadata, conditions, CEL rules.

`ApiValue` is the base of all API values, and `doc` describes their fields for the generated CRD.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from msgspec import Meta, Struct


class Rule(NamedTuple):
    """One CEL rule of the schema (``x-kubernetes-validations``)."""

    rule: str
    message: str


def doc(description: str, *, rules: tuple[Rule, ...] = (), **schema: Any) -> Meta:
    """A field's entry in the CRD: its description, limits and CEL rules."""
    if rules:
        schema["x-kubernetes-validations"] = [r._asdict() for r in rules]
    return Meta(description=description, extra_json_schema=schema or None)


class ApiValue(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of all API values: frozen, camelCase on the wire, defaults omitted."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


class OwnerReference(ApiValue, frozen=True, kw_only=True):
    """A reference to an owner; the object is deleted together with it."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(ApiValue, frozen=True, kw_only=True):
    """The fields of Kubernetes' ObjectMeta that KubeAI reads."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()

    @property
    def version(self) -> int:
        """The resourceVersion as a number, which orders the versions of one object.

        Versions within one resource are comparable (officially since Kubernetes 1.35, in practice
        since etcd 3). 0 if it is not a number.
        """
        return int(self.resource_version) if self.resource_version.isdecimal() else 0


class Condition(ApiValue, frozen=True, kw_only=True):
    """One aspect of the Model's state, with its reason."""

    type: Annotated[str, doc("Type of the condition, e.g. Ready.", maxLength=316)]
    status: Annotated[Literal["True", "False", "Unknown"], doc("Status of the condition.")]
    reason: Annotated[
        str,
        doc(
            "Machine-readable reason for the status, as one word.",
            maxLength=1024,
            pattern="^([A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?)?$",
        ),
    ] = ""
    message: Annotated[str, doc("Human-readable details.", maxLength=32768)] = ""
    last_transition_time: Annotated[
        datetime | None, doc("When the status last changed.", format="date-time")
    ] = None
    observed_generation: Annotated[
        int | None,
        doc("The metadata.generation that the condition is based on.", format="int64", minimum=0),
    ] = None
