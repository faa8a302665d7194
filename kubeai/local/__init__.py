"""``kubeai local``: the whole of KubeAI on one machine, without a cluster.

Runs three processes besides the workers: the embedded Kubernetes API, the process kubelet, and
the supervisor (the same one that ``kubeai serve`` runs). ``run`` starts them. This package imports
nothing, because the API and the kubelet are separate processes that need little of it.
"""
