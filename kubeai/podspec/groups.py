"""A replica on several nodes: a LeaderWorkerSet with one group, made from a pod's manifest. Pure.

The leader is the pod that `kubeai.podspec.template` builds: it has the API server and the probes,
and requests are sent to it alone. The workers run the same engine without an API server. vLLM's own
multiprocessing connects them. Each pod gets the number of pods, its own index and the leader's
address as arguments; the last two come from variables that LWS sets in every container.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from kubeai.api.config.profiles import Size
from kubeai.api.model import MODEL_LABEL, MODEL_UID_LABEL, Model
from kubeai.errors import ModelError
from kubeai.podspec.container import PORT_NAME, SERVER_CONTAINER, Object, Server
from kubeai.podspec.engines.vllm import names_model
from kubeai.podspec.files import owner_reference

API_VERSION, KIND = "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"
# Labels that LWS sets on pods, and the prefix of the annotations that configure it.
PREFIX = "leaderworkerset.sigs.k8s.io/"
SET_LABEL, WORKER_LABEL = f"{PREFIX}name", f"{PREFIX}worker-index"
LEADER_ADDRESS, WORKER_INDEX = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"
# 50 characters are left for the name of a set by the labels of its pods' StatefulSets, and it is a
# DNS label, because it is the name of a Service too.
_STEM_MAX_CHARS = 27
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words by accident
_SUFFIX_CHARS = 5
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_HEADLESS = "--headless"


def parallel(model: Model, server: Server, size: Size) -> Server:
    """The engine's container, with arguments that divide the model.

    Tensor parallelism within a node, pipeline parallelism between nodes; the Model's own arguments
    follow these and override them. ModelError if the engine cannot be divided like this.
    """
    if not size.parallel:
        return server
    if model.spec.engine != "VLLM":
        raise ModelError(
            "spec.resourceProfile",
            f"{model.spec.engine} does not run on several nodes, only VLLM does; use "
            f"{size.profile}:{size.units}",
            "InvalidProfile",
        )
    args = [f"--tensor-parallel-size={size.units}", f"--pipeline-parallel-size={size.nodes}"]
    if size.nodes == 1:
        return msgspec.structs.replace(server, args=[*server.args, *args])
    args += [f"--nnodes={size.nodes}", f"--master-addr={LEADER_ADDRESS}"]
    # Only `vllm serve` starts an engine without an API server. Its model is an argument of its own,
    # and it refuses the option.
    if names_model(model.spec.args):
        raise ModelError(
            "spec.args",
            "--model is not supported with several nodes; use spec.url for the weights",
            "InvalidArgs",
        )
    served, *others = server.args
    first = [served.removeprefix("--model="), *others]
    return msgspec.structs.replace(
        server,
        command=["vllm", "serve"],
        args=[*first, *args],
        more_args=[*server.more_args, "--node-rank=0"],
    )


def leader_worker_set(model: Model, leader: Object, size: Size, *, mock: bool) -> Object:
    """The manifest of one replica, without a name. ``leader``: the leader's pod.

    ``mock``: the workers run the mock engine like the leader, independently of it.
    """
    worker = _worker(leader, mock=mock)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "namespace": model.metadata.namespace,
            "labels": dict(leader["metadata"]["labels"]),
            "annotations": set_annotations(model),
            "ownerReferences": [owner_reference(model)],
        },
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": size.nodes,
                # An engine that has lost one of its pods cannot continue.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _template(leader),
                "workerTemplate": _template(worker),
            },
        },
    }


def set_annotations(model: Model) -> dict[str, str]:
    """The Model's annotations that configure its sets."""
    given = model.metadata.annotations
    return {key: value for key, value in given.items() if key.startswith(PREFIX)}


def set_name(model: Model, hash_: str, ordinal: int) -> str:
    """Like the name of a pod, but at most 48 characters, and a DNS label."""
    stem = re.sub(r"[^a-z0-9]+", "-", model.metadata.name.lower())[:_STEM_MAX_CHARS].strip("-")
    return f"model-{stem}-{hash_}-{suffix(model, ordinal)}"


def suffix(model: Model, ordinal: int) -> str:
    """The last part of a replica's name, derived from the Model's uid and an ordinal."""
    digest = hashlib.blake2b(f"{model.metadata.uid}/{ordinal}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    text = ""
    for _ in range(_SUFFIX_CHARS):
        number, index = divmod(number, len(_ALPHABET))
        text += _ALPHABET[index]
    return text


def _template(pod: Object) -> Object:
    metadata = {key: pod["metadata"][key] for key in ("labels", "annotations")}
    return {"metadata": metadata, "spec": pod["spec"]}


def _worker(leader: Object, *, mock: bool) -> Object:
    """The pod of a worker: the leader's without an API, and without the labels that select it."""
    pod: Object = msgspec.json.decode(msgspec.json.encode(leader))
    labels: dict[str, Any] = pod["metadata"]["labels"]
    for label in ("app", MODEL_LABEL):  # of the scale subresource, and of the Model's Service
        labels.pop(label, None)
    assert MODEL_UID_LABEL in labels  # by which the operator knows its pods
    server = next(c for c in pod["spec"]["containers"] if c["name"] == SERVER_CONTAINER)
    for probe in _PROBES:
        server.pop(probe, None)
    ports = [port for port in server.get("ports") or () if port.get("name") != PORT_NAME]
    server["ports"] = ports
    if not ports:
        del server["ports"]
    if not mock:
        rank = f"--node-rank={WORKER_INDEX}"
        args = [rank if arg == "--node-rank=0" else arg for arg in server.get("args") or ()]
        server["args"] = [*args, _HEADLESS]
    return pod
