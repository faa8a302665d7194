"""The user-facing API: the Model type, its generated CRD, and the system config. Pure values."""
