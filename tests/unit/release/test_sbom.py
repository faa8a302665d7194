"""An SBOM lists what is installed, with versions, licences, hashes and purls; always the same."""

from __future__ import annotations

import json

import pytest

from release import sbom

EPOCH = 1_700_000_000
STATUS = """Package: libssl3
Status: install ok installed
Architecture: amd64
Version: 3.0.1-1
Description: Secure Sockets Layer
 More about it.

Package: tzdata
Architecture: all
Version: 2026a
Description: time zones
"""
COPYRIGHT = (
    "Format: x\n\nFiles: *\nLicense: Apache-2.0\n\nLicense: Apache-2.0\n text\nLicense: MIT\n"
)


def distribution(folder, name, version, *lines):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n" + "".join(
        f"{line}\n" for line in lines
    )
    (info / "METADATA").write_text(text)


@pytest.fixture
def root(tmp_path):
    """A root file system with Debian packages and Python distributions."""
    packages = tmp_path / "opt/kubeai/lib/python3.13/site-packages"
    distribution(
        packages,
        "Kubeai_Gateway",
        "1.2.3",
        "License-Expression: Apache-2.0",
        "Requires-Dist: aiohttp>=3",
        "Requires-Dist: other; extra == 'x'",
    )
    distribution(packages, "aiohttp", "3.14.5", "License: Apache-2.0 AND MIT", "Summary: HTTP")
    distribution(packages, "plain", "1", "Classifier: License :: OSI Approved :: MIT License")
    distribution(packages, "silent", "1")
    dpkg = tmp_path / "var/lib/dpkg"
    dpkg.mkdir(parents=True)
    (dpkg / "status").write_text(STATUS)
    (dpkg / "status.d").mkdir()
    (dpkg / "status.d/base").write_text("Package: base\nVersion: 1\nArchitecture: amd64\n")
    (dpkg / "status.d/base.md5sums").write_text("0  etc/x\n")
    (tmp_path / "usr/share/doc/libssl3").mkdir(parents=True)
    (tmp_path / "usr/share/doc/libssl3/copyright").write_text(COPYRIGHT)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_ID="13"\n')
    return tmp_path


def write(root, out, epoch=EPOCH):
    out.mkdir()
    return sbom.write_image(root, "1.2.3", epoch, out, "amd64")


def test_an_image_lists_its_debian_packages_and_python_distributions(root, tmp_path):
    document = json.loads(write(root, tmp_path / "out").read_text())
    found = {each["purl"]: each for each in document["components"]}
    assert found.keys() == {
        "pkg:deb/debian/libssl3@3.0.1-1?arch=amd64&distro=debian-13",
        "pkg:deb/debian/tzdata@2026a?arch=all&distro=debian-13",
        "pkg:deb/debian/base@1?arch=amd64&distro=debian-13",
        "pkg:pypi/kubeai-gateway@1.2.3",
        "pkg:pypi/aiohttp@3.14.5",
        "pkg:pypi/plain@1",
        "pkg:pypi/silent@1",
    }
    openssl = found["pkg:deb/debian/libssl3@3.0.1-1?arch=amd64&distro=debian-13"]
    assert [each["license"]["name"] for each in openssl["licenses"]] == ["Apache-2.0", "MIT"]
    assert openssl["description"] == "Secure Sockets Layer"
    assert document["metadata"]["component"]["type"] == "container"


@pytest.mark.parametrize(
    ("purl", "licences"),
    [
        ("pkg:pypi/kubeai-gateway@1.2.3", [{"expression": "Apache-2.0"}]),
        ("pkg:pypi/aiohttp@3.14.5", [{"expression": "Apache-2.0 AND MIT"}]),
        ("pkg:pypi/plain@1", [{"license": {"name": "MIT License"}}]),
        ("pkg:pypi/silent@1", []),
    ],
)
def test_the_licence_is_the_most_precise_statement_of_the_metadata(root, tmp_path, purl, licences):
    document = json.loads(write(root, tmp_path / "out").read_text())
    (found,) = (each for each in document["components"] if each["purl"] == purl)
    stated = [
        {
            key: {"name": value["name"]} if key == "license" else value
            for key, value in each.items()
            if key != "acknowledgement"
        }
        for each in found.get("licenses", [])
    ]
    assert stated == licences


def test_the_document_is_the_same_each_time_and_another_for_another_commit(root, tmp_path):
    first, second = (write(root, tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    document = json.loads(first.read_text())
    assert document["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    other = json.loads(write(root, tmp_path / "three", EPOCH + 1).read_text())
    assert document["serialNumber"] != other["serialNumber"]


def test_dependencies_connect_what_is_installed(root, tmp_path):
    document = json.loads(write(root, tmp_path / "out").read_text())
    edges = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    assert edges["pypi/kubeai-gateway@1.2.3"] == ["pypi/aiohttp@3.14.5"]
    assert len(edges["oci/kubeai@1.2.3?arch=amd64"]) == 7


def test_hashes_are_those_of_the_archives(root):
    folder = next(root.rglob("site-packages"))
    found = sbom.python_components([folder], {"aiohttp": "ab" * 32})
    assert [each.content for each in found["aiohttp"][0].hashes] == ["ab" * 32]
    assert not found["plain"][0].hashes
