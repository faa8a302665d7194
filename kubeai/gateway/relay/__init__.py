"""The relay: HTTP/1.1 between clients' connections and engines."""
