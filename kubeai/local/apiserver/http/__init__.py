"""HTTP on top of the storage: requests, responses, discovery, and the proxy to the kubelets."""
