"""The process kubelet: runs the pods of one Node as processes of this machine.

``__main__`` wires it; ``agent`` speaks with the API; ``runner`` lives one pod's life; ``shim`` is
the process that guards a container. docs/process-kubelet.md says what differs from a cluster's.
"""
