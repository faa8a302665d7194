"""The system config, and how its values and a manifest's are read."""
