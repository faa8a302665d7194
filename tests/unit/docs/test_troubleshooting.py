"""docs/reference/troubleshooting.md has a row for each reason in the code, and no others."""

from __future__ import annotations

import ast
import re

import pytest
from doc_pages import rows, sections
from fakes.reasons import reasons
from repository import REPOSITORY

from kubeai.local import unserved
from kubeai.operator import blocks, keys
from kubeai.operator.conditions import OURS

OF_MODELS = (
    "States of a Model",
    "Problems of a Model",
    "Problems of a pod",
    "Caches",
    "Adapters",
    "Aliases and fallbacks",
)
LOCAL = ("Process kubelet", "Jobs")
REASON = re.compile(r"`([A-Za-z]+)`")


def rows_by_reason(text: str) -> dict[str, list[str]]:
    """Reason → the other cells of its row."""
    found: dict[str, list[str]] = {}
    for first, *others in rows(text):
        for reason in REASON.findall(first):
            assert reason not in found, reason
            found[reason] = others
    return found


SECTIONS = {
    title: rows_by_reason(text) for title, text in sections("reference/troubleshooting.md").items()
}


def reasons_of(*titles: str) -> set[str]:
    return {reason for title in titles for reason in SECTIONS[title]}


def test_every_reason_of_the_operator_has_a_row_and_nothing_else_has():
    code = reasons("operator", "podspec", "supervisor", "api")
    code |= blocks.AT_ONCE | blocks.NEEDS_NODE | blocks.STARTS_AGAIN | blocks.CACHE_FAILED
    code |= {keys.UNUSABLE, keys.DUPLICATE, blocks.ADAPTERS_FAILED}
    # Reasons of Kubernetes that the operator treats in a special way.
    code |= blocks.POD_AT_ONCE - reasons("local/kubelet")
    assert {"ScaledToZero", "PodRefused", "ServiceRefused"} <= code  # it finds some
    assert reasons_of(*OF_MODELS, "Events") == code | {unserved.REASON}


def test_every_reason_of_the_process_kubelet_and_the_job_controller_has_a_row():
    code = reasons("local/kubelet", "local/jobs") - reasons()
    assert {"EngineNotInstalled", "MountError", "BackoffLimitExceeded"} <= code
    assert reasons_of(*LOCAL) == code


def pairs() -> set[tuple[str, str]]:
    """Type and reason of the conditions that conditions.py writes as constants."""
    tree = ast.parse((REPOSITORY / "kubeai/operator/conditions.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_condition":
            type_, _, reason = node.args[:3]
            if isinstance(type_, ast.Constant) and isinstance(reason, ast.Constant):
                found.add((str(type_.value), str(reason.value)))
    return found


def test_a_row_names_the_conditions_that_may_have_its_reason():
    assert ("Ready", "ScaledToZero") in pairs()
    for type_, reason in pairs():
        all_cells = [SECTIONS[title][reason] for title in OF_MODELS if reason in SECTIONS[title]]
        assert any(type_ in cells[0].split(", ") for cells in all_cells), (type_, reason)
    for title in OF_MODELS:
        for reason, cells in SECTIONS[title].items():
            assert set(cells[0].split(", ")) <= set(OURS), (title, reason)


@pytest.mark.parametrize("title", [*OF_MODELS, "Events", *LOCAL])
def test_each_row_says_what_it_means_and_what_to_do(title):
    for reason, cells in SECTIONS[title].items():
        assert len(cells) == 3, reason
        assert all(cells), reason
        assert not any(cell.endswith(".") for cell in cells), reason
