"""The kubelet's HTTP server: container logs and exec, for the API server."""
