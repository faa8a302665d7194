"""What users write: the Model type, the CRD made from it, the system config. Pure values."""
