"""The container runtime: starts, supervises and ends containers, and keeps their logs."""
