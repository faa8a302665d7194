"""The process kubelet: runs the pods of one Node as processes of this machine.

``__main__`` wires it up; ``agent`` talks to the API; ``runner`` runs one pod; ``shim`` is the
process that supervises a container. docs/process-kubelet.md lists the differences from Kubernetes'.
"""
