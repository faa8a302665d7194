"""Amazon SQS.

``broker.py`` receives and publishes, ``messages.py`` has the encoding of messages, and ``batch.py``
collects requests into batches.
"""
