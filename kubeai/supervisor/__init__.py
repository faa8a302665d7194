"""The main process: runs the operator and the workers."""
