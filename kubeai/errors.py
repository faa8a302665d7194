"""Errors that a person causes and can mend.

Each names the place: a path in the system config (``modelAutoscaling.interval``), a field of a
manifest (``spec.resourceProfile``), an option, a file. The command line prints them as one line
and no traceback; the operator puts them into a Model's conditions.
"""


class KubeAIError(Exception):
    """Something outside the program is wrong; the message says what and where."""


class ConfigError(KubeAIError):
    """The system config is wrong. ``path`` is the dotted path of the key."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class ModelError(KubeAIError):
    """A Model cannot be run as it is written. ``field`` is its path, e.g. ``spec.url``."""

    def __init__(self, field: str, message: str, reason: str = "InvalidModel") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = reason
