"""The served kinds: their resources, strategies (defaults and validation) and printed columns."""
