"""The name of this package's distribution on PyPI."""

DISTRIBUTION = "kubeai-gateway"  # `kubeai` on PyPI is an unrelated project


def install_hint(extra: str) -> str:
    """The command that installs an optional dependency, for use in an error message.

    pip keeps a distribution that is already installed, so the first command also works after an
    editable install. The second one works in a checkout that is not installed.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
