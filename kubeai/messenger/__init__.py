"""The messenger: a process that takes requests from message brokers and publishes the responses."""
