"""Software bills of materials in CycloneDX's JSON: of the Python distribution and of the image.

Both list what is installed in a folder: Python distributions by their metadata, and Debian packages
by dpkg's. The documents are reproducible: the time is that of the commit, and the serial number is
derived from the contents.
"""

from __future__ import annotations

import email.parser
import hashlib
import importlib.metadata
import json
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.contrib.this.builders import this_component
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from release.architectures import GLIBC
from release.errors import ReleaseError
from release.files import environment, run, sha256
from release.versions import Version

SCHEMA = SchemaVersion.V1_6
DISTRIBUTION = "kubeai-gateway"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "sbom.kubeai.org")
CLASSIFIER = "License :: OSI Approved :: "
LICENCES = LicenseFactory()


def _licence(metadata: Mapping[str, Any]) -> License | None:
    """Return what a distribution's metadata say of its licence: the most precise statement."""
    declared = LicenseAcknowledgement.DECLARED
    if expression := metadata.get("license_expression"):
        return LICENCES.make_with_expression(expression, acknowledgement=declared)
    text = metadata.get("license", "").strip()
    if text and "\n" not in text and text != "UNKNOWN":
        return LICENCES.make_from_string(text, license_acknowledgement=declared)
    for classifier in metadata.get("classifier", ()):
        if classifier.startswith(CLASSIFIER):
            name = classifier.removeprefix(CLASSIFIER)
            return LICENCES.make_with_name(name, acknowledgement=declared)
    return None


def python_components(
    folders: Iterable[Path], hashes: Mapping[str, str]
) -> dict[str, tuple[Component, list[str]]]:
    """Map the names of the distributions in `folders` to a component and what it requires.

    `hashes` has the SHA-256 of the archives that they were installed from, by name.
    """
    found: dict[str, tuple[Component, list[str]]] = {}
    for each in importlib.metadata.distributions(path=[str(folder) for folder in folders]):
        metadata = each.metadata.json
        name = canonicalize_name(each.name)
        licence = _licence(metadata)
        component = Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=each.version,
            description=str(metadata.get("summary", "")) or None,
            licenses=[licence] if licence else (),
            hashes=[
                HashType(alg=HashAlgorithm.SHA_256, content=digest)
                for digest in filter(None, (hashes.get(name),))
            ],
            purl=PackageURL("pypi", name=name, version=each.version),
            bom_ref=f"pypi/{name}@{each.version}",
        )
        requirements = (Requirement(text) for text in each.requires or ())
        found[name] = component, sorted({canonicalize_name(one.name) for one in requirements})
    return found


def _dpkg_packages(root: Path) -> Iterator[tuple[Mapping[str, str], str]]:
    """Yield the control data of each Debian package in `root`, and the hash of its record."""
    folder = root / "var/lib/dpkg"
    texts: list[str] = []
    if (folder / "status").exists():
        texts += (folder / "status").read_text(encoding="utf-8").split("\n\n")
    texts += [
        path.read_text(encoding="utf-8")
        for path in sorted((folder / "status.d").glob("*"))
        if path.suffix != ".md5sums"
    ]
    for text in texts:
        control = dict(email.parser.HeaderParser().parsestr(text.strip() + "\n").items())
        if "Package" in control and "Version" in control:
            yield control, hashlib.sha256(text.strip().encode()).hexdigest()


def debian_licences(copyright_file: Path) -> list[str]:
    """Return the short names of licences in a machine-readable debian/copyright, sorted."""
    try:
        lines = copyright_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("License:")}
    return sorted(names - {""})


def debian_components(root: Path, distribution: str) -> list[Component]:
    """Return the Debian packages that are installed in the root file system `root`."""
    made = []
    for control, record in _dpkg_packages(root):
        name, version, architecture = (
            control[key] for key in ("Package", "Version", "Architecture")
        )
        licences = debian_licences(root / "usr/share/doc" / name / "copyright")
        made.append(
            Component(
                type=ComponentType.LIBRARY,
                name=name,
                version=version,
                description=control.get("Description", "").partition("\n")[0] or None,
                licenses=[LICENCES.make_with_name(each) for each in licences],
                purl=PackageURL(
                    *("deb", "debian", name, version),
                    qualifiers={"arch": architecture, "distro": distribution},
                ),
                properties=[Property(name="kubeai:dpkg-record-sha256", value=record)],
                bom_ref=f"deb/{name}@{version}?arch={architecture}",
            )
        )
    return made


def document(
    main: Component,
    python: Mapping[str, tuple[Component, list[str]]],
    others: Iterable[Component],
    epoch: int,
) -> str:
    """Return the document of `main`, validated against CycloneDX's schema."""
    bom = Bom()
    bom.metadata.component = main
    bom.metadata.tools.components.add(this_component())
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    for component, _ in python.values():
        bom.components.add(component)
    for component in others:
        bom.components.add(component)
    for component, requires in python.values():
        bom.register_dependency(component, [python[one][0] for one in requires if one in python])
    bom.register_dependency(main, [each for each in bom.components if each is not main])
    contents = "\n".join(sorted(str(each.bom_ref) for each in bom.components))
    bom.serial_number = uuid.uuid5(NAMESPACE, f"{main.bom_ref} {epoch}\n{contents}")
    text: str = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=2)
    # Imported here because its grammars take seconds to compile.
    from cyclonedx.validation.json import JsonStrictValidator

    if errors := JsonStrictValidator(SCHEMA).validate_str(text):
        raise ReleaseError(f"the SBOM of {main.name} is not valid: {errors}")
    return json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def _name_of(root: Path) -> str:
    """Return the distribution of a root file system as purl's qualifier has it: debian-13."""
    lines = (root / "etc/os-release").read_text().splitlines()
    values = dict(line.partition("=")[::2] for line in lines)
    return f"{values.get('ID', 'debian')}-{values.get('VERSION_ID', '')}".replace('"', "")


def write_image(rootfs: Path, version: str, epoch: int, out: Path, architecture: str) -> Path:
    """Write the SBOM of an image's root file system, for one architecture."""
    packages = {path.parent for path in rootfs.rglob("*.dist-info") if path.is_dir()}
    main = Component(
        type=ComponentType.CONTAINER,
        name="kubeai",
        version=version,
        purl=PackageURL("oci", name="kubeai", qualifiers={"arch": architecture, "tag": version}),
        bom_ref=f"oci/kubeai@{version}?arch={architecture}",
    )
    text = document(
        main,
        python_components(sorted(packages), {}),
        debian_components(rootfs, _name_of(rootfs)),
        epoch,
    )
    target = out / f"kubeai-{version}-image-{architecture}.cdx.json"
    target.write_text(text, encoding="utf-8")
    return target


def platforms(architecture: str) -> list[str]:
    """Return pip's options for the Linux of our wheels: any glibc up to theirs."""
    glibc = [f"manylinux_{GLIBC[0]}_{minor}" for minor in range(5, GLIBC[1] + 1)]
    names = ["manylinux1", "manylinux2010", "manylinux2014", *glibc]
    return [part for name in names for part in ("--platform", f"{name}_{architecture}")]


def resolve(source: Path, wheel: Path, scratch: Path, epoch: int) -> dict[str, str]:
    """Install a wheel with its pinned requirements in `scratch`; return the archives' hashes.

    The wheel may be for another interpreter and machine. Markers of requirements are evaluated for
    this interpreter.
    """
    report = scratch / "report.json"
    (tag, *_) = parse_wheel_filename(wheel.name)[3]
    architecture = tag.platform.split("_", 3)[3]
    version = tag.interpreter.removeprefix("cp")
    run(
        (
            *(sys.executable, "-m", "pip", "install", "-q", "--ignore-installed", "--no-compile"),
            *("--disable-pip-version-check", "--only-binary", ":all:"),
            *("--implementation", "cp", "--python-version", f"{version[0]}.{version[1:]}"),
            *platforms(architecture),
            *("-c", source / "constraints.txt", "--report", report),
            *("--target", scratch / "installed", wheel),
        ),
        cwd=scratch,
        env=environment(epoch),
    )
    installed = json.loads(report.read_text())["install"]
    return {
        canonicalize_name(each["metadata"]["name"]): each["download_info"]["archive_info"][
            "hashes"
        ]["sha256"]
        for each in installed
    }


def build(
    source: Path, version: Version, epoch: int, out: Path, wheels: Iterable[Path]
) -> list[Path]:
    """Write the SBOM of the distribution: KubeAI and what it requires, without extras.

    The hashes of requirements are those of the archives for the first wheel. All of
    KubeAI's own wheels are listed.
    """
    wheels = sorted(wheels)
    if not wheels:
        raise ReleaseError("the SBOM lists what wheels require: build the part wheels as well")
    with tempfile.TemporaryDirectory() as folder:
        hashes = resolve(source, wheels[0], Path(folder), epoch)
        python = python_components([Path(folder) / "installed"], hashes)
    main, _ = python.pop(canonicalize_name(DISTRIBUTION))
    main.type = ComponentType.APPLICATION
    main.hashes = ()
    main.properties = [
        Property(name=f"kubeai:sha256:{wheel.name}", value=sha256(wheel)) for wheel in wheels
    ]
    target = out / f"{DISTRIBUTION}-{version}.cdx.json"
    target.write_text(document(main, python, (), epoch), encoding="utf-8")
    return [target]
