"""OpenAPI schemas and CEL rules: pruning, defaulting and validation of objects."""
