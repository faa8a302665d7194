"""What a Model gets from the system config: its resource profile and its engine's image."""

from __future__ import annotations

import msgspec

from kubeai.api.config.quantity import parse_quantity
from kubeai.api.config.strict import did_you_mean
from kubeai.api.config.system import ResourceProfile, SystemConfig
from kubeai.api.model import Engine, Model
from kubeai.errors import ModelError

PROFILE_COUNT_MAX = 10_000
DEFAULT_IMAGE = "default"  # the image name used if there is no other


def resolve_profile(config: SystemConfig, wanted: str) -> ResourceProfile:
    """The profile for ``name:count``, with quantities multiplied. ModelError if it is unknown.

    An empty ``wanted`` means no requests, no limits and the default image.
    """
    if not wanted:
        return ResourceProfile()
    name, colon, count_text = wanted.partition(":")
    if not colon or not count_text.isascii() or not count_text.isdigit():
        raise _bad_profile(f"{wanted!r} must be <profile>:<count>, such as nvidia-gpu-l4:2")
    count = int(count_text[:9])
    if not 1 <= count <= PROFILE_COUNT_MAX:
        raise _bad_profile(f"the count of {wanted!r} must be from 1 to {PROFILE_COUNT_MAX}")
    profile = config.resource_profiles.get(name)
    if profile is None:
        hint = did_you_mean(name, config.resource_profiles)
        raise _bad_profile(f"the system config has no resource profile {name!r}{hint}")
    return msgspec.structs.replace(
        profile,
        requests=_multiply(profile.requests, count),
        limits=_multiply(profile.limits, count),
    )


def replica_requests(config: SystemConfig, model: Model) -> dict[str, int]:
    """What one replica requests, in billionths; a limit without a request is one.

    Nothing if the Model's profile is unknown, because it has no replicas then.
    """
    try:
        profile = resolve_profile(config, model.spec.resource_profile)
    except ModelError:
        return {}
    amounts = profile.limits | profile.requests
    return {name: parse_quantity(amount).nanos for name, amount in amounts.items()}


def _multiply(amounts: dict[str, str], count: int) -> dict[str, str]:
    return {name: str(parse_quantity(amount) * count) for name, amount in amounts.items()}


def _bad_profile(message: str) -> ModelError:
    return ModelError("spec.resourceProfile", message, "InvalidProfile")


def server_image(config: SystemConfig, engine: Engine, profile: ResourceProfile) -> str:
    """The image of ``engine`` with the profile's image name, else its default image."""
    images = config.model_servers.images(engine)
    image = images.get(profile.image_name) or images.get(DEFAULT_IMAGE)
    if not image:
        raise ModelError(
            "spec.image",
            f"is empty, and the system config has no default image for it "
            f"(modelServers.{engine}.images.{DEFAULT_IMAGE})",
            "NoImage",
        )
    return image
