"""The Job controller of `kubeai local`."""
