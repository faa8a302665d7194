"""``x-kubernetes-validations``: CEL rules at every level of a structural schema.

Compiled when the schema is, evaluated when an object fits the schema. A rule that names
`oldSelf` is a transition rule: it runs on updates, where the old object has the same place
(elements of lists of type map are matched by their keys; other lists' elements have none).
"""

from __future__ import annotations

from typing import Any

from kubeai.local.apiserver.status import Cause

Object = dict[str, Any]


class Rules:
    """The rules of one schema."""

    def __init__(self, root: Object) -> None:
        self._root = root
        self.mistakes: list[Cause] = []  # rules that cannot be compiled, as paths in the schema

    def check(self, obj: Object, old: Object | None) -> list[Cause]:
        return []
