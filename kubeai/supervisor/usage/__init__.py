"""What API keys use: counted from the workers' reports, exported as metrics, kept in ConfigMaps.

    book     what the supervisor calls
    store    the ConfigMaps: reads, writes, retries
    metrics  Prometheus metrics
    shards   which ConfigMap has what, and the writes to it; pure
    ledger   the counts of this KubeAI replica; pure

Each module imports only those below it.
"""
