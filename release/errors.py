"""What stops a release."""


class ReleaseError(Exception):
    """A release that must not be published, or cannot be built. The text says what to do."""
