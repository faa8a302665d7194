"""A JSON Patch operation (RFC 6902) on a pod: the type of those in Models and in the system config.

Those in a Model are decoded by msgspec, after the API server has checked the rules; those in the
system config by `kubeai.api.config.strict`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import force_setattr

from kubeai.api.objects import ApiValue, Rule, doc

JSON_PATCHES_MAX = 64  # of a Model
POINTER_MAX_CHARS = 1024
VALUE_MAX_LEVELS = 32  # far below Python's recursion limit, which comparing and copying share
# "zero": an empty pointer is meaningful, it is the whole document.
_Pointer = Annotated[str, Meta(extra={"zero": True})]
_IS_POINTER = Rule("self == '' || self.startsWith('/')", "a JSON pointer must start with '/'")


class JSONPatch(ApiValue, frozen=True, kw_only=True):
    """One JSON Patch operation (RFC 6902)."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(self.op in ['move', 'copy']) || has(self.from)",
            "from is required with the operations move and copy",
        ),
    )

    op: Annotated[
        Literal["add", "remove", "replace", "move", "copy", "test"], doc("Operation to apply.")
    ]
    path: Annotated[
        _Pointer,
        doc(
            "Path in the pod, as a JSON pointer, e.g. /spec/containers/0/env/-.",
            maxLength=POINTER_MAX_CHARS,
            rules=(_IS_POINTER,),
        ),
    ]
    value: Annotated[Any, doc("Value of add, replace and test; any JSON.")] = None
    from_: Annotated[
        _Pointer | UnsetType,
        doc(
            "Source of move and copy, as a JSON pointer.",
            maxLength=POINTER_MAX_CHARS,
            rules=(_IS_POINTER,),
        ),
    ] = field(name="from", default=UNSET)

    def __post_init__(self) -> None:
        """Drop a value that is nested too deeply. One such Model must not break the whole list."""
        level = [self.value]
        for _ in range(VALUE_MAX_LEVELS):
            level = [below for each in level for below in _members(each)]
            if not level:
                return
        force_setattr(self, "value", UNSET)

    def operation(self) -> dict[str, Any]:
        """The operation in the jsonpatch package's format. ValueError if its value was dropped."""
        if self.value is UNSET:
            raise ValueError(f"its value is nested more than {VALUE_MAX_LEVELS} levels deep")
        operation: dict[str, Any] = {"op": self.op, "path": self.path}
        if self.op in ("add", "replace", "test"):
            operation["value"] = self.value
        if self.from_ is not UNSET:
            operation["from"] = self.from_
        return operation


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
