"""Errors that a user causes and can fix.

Each names its cause: a path in the system config (``modelAutoscaling.interval``), a field of a
manifest (``spec.resourceProfile``), an option, or a file. The command line prints them as one line
without a traceback; the operator reports them in a Model's conditions.
"""

DISTRIBUTION = "kubeai-gateway"  # on PyPI, where `kubeai` is an unrelated project
QUOTED_MAX_CHARS = 200  # of a user's text in an error message


def quoted(text: str) -> str:
    """A user's text for an error message: in quotes, and cut off when it is long."""
    return repr(text if len(text) <= QUOTED_MAX_CHARS else text[:QUOTED_MAX_CHARS] + "…")


def decode_problem(error: Exception) -> str:
    """What a decoder says about a text. Its words for deep nesting depend on Python's version."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def install_hint(extra: str) -> str:
    """The command that installs an optional dependency, for use in an error message.

    pip keeps a distribution that is already installed, so the first command also works after an
    editable install. The second one works in a checkout that is not installed.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


class KubeAIError(Exception):
    """Invalid input or a failure outside the program; the message says what and where."""


class ConfigError(KubeAIError):
    """The system config is invalid. ``path`` is the dotted path of the key."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class ModelError(KubeAIError):
    """A Model's spec cannot be run. ``field`` is the path of the field, e.g. ``spec.url``."""

    def __init__(self, field: str, message: str, reason: str = "InvalidModel") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = reason
