"""Jobs: defaults, validation, and the labels and selector of a Job's own pods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.pods import check_pod_spec, default_pod_spec
from kubeai.local.apiserver.kinds.strategy import Strategy

Object = dict[str, Any]

JOB_UID_LABEL, JOB_NAME_LABEL = "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name"
_JOB_NUMBERS = (
    "parallelism", "completions", "activeDeadlineSeconds", "backoffLimit",
    "ttlSecondsAfterFinished",
)  # fmt: skip
_JOB_FIXED = ("completions", "selector", "template", "completionMode")


@dataclass(slots=True, frozen=True)
class JobStrategy(Strategy):
    """The strategy of Jobs."""

    # Kubernetes keeps this default from before garbage collection existed.
    default_propagation: str | None = "Orphan"
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        """Set defaults, and on creation the selector of the Job's own pods."""
        spec = obj["spec"] = obj.get("spec") or {}
        if spec.get("parallelism") is None and spec.get("completions") is None:
            spec["completions"] = 1  # with parallelism alone, one success is enough
        for name, value in (
            ("parallelism", 1), ("backoffLimit", 6), ("suspend", False),
            ("completionMode", "NonIndexed"), ("manualSelector", False),
            ("podReplacementPolicy", "TerminatingOrFailed"),
        ):  # fmt: skip
            if spec.get(name) is None:
                spec[name] = value
        template = spec.setdefault("template", {})
        if isinstance(template.get("spec"), dict):
            default_pod_spec(template["spec"])
        if old is None:
            obj["status"] = {}
            _select_own_pods(obj)

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        """Validate numbers, the pod template, and what an update may not change."""
        spec = obj.get("spec") or {}
        causes = _check_job_numbers(spec)
        if old is not None:
            return causes + _check_job_change(spec, old["spec"])
        template = spec.get("template") or {}
        causes += _check_job_selector(spec, obj["metadata"].get("uid"))
        causes += [
            cause._replace(field="spec.template." + cause.field)
            for cause in check_pod_spec(template.get("spec"))
        ]
        if (template.get("spec") or {}).get("restartPolicy") not in ("Never", "OnFailure"):
            why = 'Required value: valid values: "OnFailure", "Never"'
            field = "spec.template.spec.restartPolicy"
            causes.append(Cause("FieldValueRequired", why, field))
        return causes


def _select_own_pods(job: Object) -> None:
    """Add labels unique to the Job's pods, and a selector on the Job's uid."""
    spec, metadata = job["spec"], job["metadata"]
    template = spec["template"].setdefault("metadata", {})
    if not spec["manualSelector"]:
        uid, name = metadata["uid"], metadata["name"]
        ours = {JOB_UID_LABEL: uid, JOB_NAME_LABEL: name, "controller-uid": uid, "job-name": name}
        template["labels"] = {**(template.get("labels") or {}), **ours}
        selector = spec.setdefault("selector", {})
        selector.setdefault("matchLabels", {})[JOB_UID_LABEL] = uid
    if template.get("labels") and not metadata.get("labels"):
        metadata["labels"] = dict(template["labels"])


def _check_job_numbers(spec: Object) -> list[Cause]:
    return [
        Cause(
            "FieldValueInvalid",
            f"Invalid value: {spec[name]}: must be greater than or equal to 0",
            f"spec.{name}",
        )
        for name in _JOB_NUMBERS
        if (spec.get(name) or 0) < 0
    ]


def _check_job_selector(spec: Object, uid: Any) -> list[Cause]:
    selector = spec.get("selector") or {}
    labels = (spec["template"].get("metadata") or {}).get("labels") or {}
    if not spec["manualSelector"]:
        if selector == {"matchLabels": {JOB_UID_LABEL: uid}}:
            return []
        shown = orjson.dumps(selector).decode()
        why = f"Invalid value: {shown}: `selector` not auto-generated"
        return [Cause("FieldValueInvalid", why, "spec.selector")]
    if not selector:
        return [Cause("FieldValueRequired", "Required value", "spec.selector")]
    wanted = selector.get("matchLabels") or {}
    if all(labels.get(name) == value for name, value in wanted.items()):
        return []
    why = "Invalid value: `selector` does not match template `labels`"
    return [Cause("FieldValueInvalid", why, "spec.template.metadata.labels")]


def _check_job_change(spec: Object, old: Object) -> list[Cause]:
    return [
        Cause("FieldValueInvalid", "Invalid value: field is immutable", f"spec.{name}")
        for name in _JOB_FIXED
        if spec.get(name) != old.get(name)
    ]
