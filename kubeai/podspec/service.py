"""The headless Service of a Model, through which external gateways find its pods. Pure.

Created if `proxy.mode` in the system config is ``external``. Name, port and selector are those of
KubeAI in Go.
"""

from __future__ import annotations

from kubeai.api.model import MODEL_LABEL, MODEL_UID_LABEL, Model
from kubeai.podspec.container import PORT, Object
from kubeai.podspec.files import owner_reference

PORT_NAME = "inference"
SELECTOR = f"app.kubernetes.io/managed-by=kubeai,{MODEL_LABEL}"  # of our Services
_UID_CHARS = 6


def service_name(model: Model) -> str:
    """``<model>-<beginning of its uid>``, as a DNS label: it begins with a letter, without dots."""
    name = model.metadata.name.replace(".", "-")
    prefix = "" if name[:1].isalpha() else "model-"
    return f"{prefix}{name}-{model.metadata.uid[:_UID_CHARS]}"


def headless_service(model: Model) -> Object:
    """The Service, owned by the Model. It selects the pods that serve requests."""
    name = model.metadata.name
    selector = {MODEL_LABEL: name, MODEL_UID_LABEL: model.metadata.uid}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(model),
            "namespace": model.metadata.namespace,
            "labels": {"app.kubernetes.io/managed-by": "kubeai", MODEL_LABEL: name},
            "ownerReferences": [owner_reference(model)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": selector,
            "ports": [{"name": PORT_NAME, "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }
