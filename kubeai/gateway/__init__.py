"""The data plane: how a worker process handles requests."""
