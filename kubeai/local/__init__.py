"""``kubeai local``: the whole of KubeAI on one machine, without a cluster.

Three processes beside the workers: the embedded Kubernetes API, the process kubelet, and the
supervisor, which is the very one that ``kubeai serve`` runs. ``run`` starts them; nothing is
imported here, because the API and the kubelet are processes of their own and need little of it.
"""
