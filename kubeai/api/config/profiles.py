"""What a Model gets from the system config: its resource profile and its engine's image."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kubeai.api.config.quantity import parse_quantity
from kubeai.api.config.strict import did_you_mean
from kubeai.api.config.system import ResourceClaims, ResourceProfile, SystemConfig
from kubeai.api.model import Engine, Model
from kubeai.errors import ModelError

PROFILE_COUNT_MAX = 10_000
NODES_MAX = 256  # of a replica
DEVICE_CLAIMS_MAX = 32  # of a pod
DEFAULT_IMAGE = "default"  # the image name used if there is no other


class Size(NamedTuple):
    """A Model's resourceProfile: ``<profile>:<count>`` or ``<profile>:<count>:<nodes>``."""

    profile: str = ""
    units: int = 1  # of the profile, for each node
    nodes: int = 1
    parallel: bool = False  # whether nodes was given: KubeAI adds arguments that divide the model


def size_of(wanted: str) -> Size:
    """Parse a resourceProfile. ModelError if it is malformed; an empty one is one node."""
    if not wanted:
        return Size()
    name, *numbers = wanted.split(":")
    whole = all(number.isascii() and number.isdigit() for number in numbers)
    if not name or len(numbers) not in (1, 2) or not whole:
        raise _bad_profile(
            f"{wanted!r} must be <profile>:<count>, such as nvidia-gpu-l4:2, or "
            "<profile>:<count>:<nodes>"
        )
    count, nodes = int(numbers[0][:9]), int(numbers[-1][:9]) if len(numbers) == 2 else 1
    if not 1 <= count <= PROFILE_COUNT_MAX:
        raise _bad_profile(f"the count of {wanted!r} must be from 1 to {PROFILE_COUNT_MAX}")
    if not 1 <= nodes <= NODES_MAX:
        raise _bad_profile(f"the nodes of {wanted!r} must be from 1 to {NODES_MAX}")
    return Size(name, count, nodes, len(numbers) == 2)


def resolve_profile(config: SystemConfig, wanted: str) -> ResourceProfile:
    """The profile for ``name:count``, with quantities multiplied. ModelError if it is unknown.

    The quantities are those of one node. An empty ``wanted`` means no requests, no limits and the
    default image.
    """
    size = size_of(wanted)
    if not size.profile:
        return ResourceProfile()
    profile = config.resource_profiles.get(size.profile)
    if profile is None:
        hint = did_you_mean(size.profile, config.resource_profiles)
        raise _bad_profile(f"the system config has no resource profile {size.profile!r}{hint}")
    return msgspec.structs.replace(
        profile,
        requests=_multiply(profile.requests, size.units),
        limits=_multiply(profile.limits, size.units),
    )


class DeviceClaims(NamedTuple):
    """What dynamic resource allocation adds to a pod: its claims, and those of its container."""

    of_pod: list[dict[str, str]]
    of_container: list[dict[str, str]]


def device_claims(profile: ResourceProfile, wanted: str) -> DeviceClaims | None:
    """The claims of a profile with ``dra``, one for each unit of the count; None without it."""
    dra, size = profile.dra, size_of(wanted)
    if dra == ResourceClaims():
        return None
    path = f"resourceProfiles.{size.profile}.dra in the system config"
    sources = {
        "resourceClaimTemplateName": dra.resource_claim_template_name,
        "resourceClaimName": dra.resource_claim_name,
    }
    source = {key: name for key, name in sources.items() if name}
    if len(source) != 1:
        keys = "resourceClaimTemplateName or resourceClaimName"
        raise _bad_profile(f"{path} must set either {keys}")
    if size.units > 1 and dra.resource_claim_name:
        raise _bad_profile(
            f"{path} names a single claim, which cannot be multiplied; use a count of 1"
        )
    if size.units > DEVICE_CLAIMS_MAX:
        raise _bad_profile(f"the count must be at most {DEVICE_CLAIMS_MAX}, because of {path}")
    numbers = range(size.units)
    names = [f"{dra.claim_name}-{n}" for n in numbers] if size.units > 1 else [dra.claim_name]
    request = {"request": dra.claim_request} if dra.claim_request else {}
    return DeviceClaims(
        [{"name": name, **source} for name in names], [{"name": name, **request} for name in names]
    )


def replica_requests(config: SystemConfig, model: Model) -> dict[str, int]:
    """What one replica requests, in billionths; a limit without a request is one.

    Nothing if the Model's profile is unknown, because it has no replicas then.
    """
    try:
        profile = resolve_profile(config, model.spec.resource_profile)
        nodes = size_of(model.spec.resource_profile).nodes
    except ModelError:
        return {}
    amounts = profile.limits | profile.requests
    return {name: parse_quantity(amount).nanos * nodes for name, amount in amounts.items()}


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
