"""``kubeai local``: the whole of KubeAI on one machine, without a cluster.

Three processes beside the workers: the embedded Kubernetes API, the process kubelet, and the
supervisor, which is the very one that ``kubeai serve`` runs.
"""

from kubeai.local.run import Options, run

__all__ = ["Options", "run"]
