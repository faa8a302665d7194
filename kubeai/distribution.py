"""The distribution that holds this package, by the name that pip knows."""

DISTRIBUTION = "kubeai-gateway"  # `kubeai` on PyPI is an unrelated project


def install_hint(extra: str) -> str:
    """The command that installs an optional dependency, for the end of an error message.

    pip keeps a distribution that is already installed, so the first form also works after an
    editable install. The second one works where a checkout is used without being installed.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
