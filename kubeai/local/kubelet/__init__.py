"""The process kubelet: runs the pods of one Node as processes of this machine.

``__main__`` wires it up; ``agent`` talks to the API, ``binder`` assigns pods to the Node, ``node``
keeps the Node's object. ``server`` serves logs and exec; ``pods`` runs each pod; ``runtime`` starts
and supervises containers. docs/reference/process-kubelet.md lists the differences from Kubernetes'.
"""
