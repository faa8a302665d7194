"""The root file system of KubeAI's image, as one folder for each layer.

``debian``: glibc, Python, certificates and time zones, from Debian's packages, without their
maintainer scripts: no shell, no package manager. ``packages``: the Python packages that KubeAI
needs, with the versions of constraints.txt. ``kubeai``: KubeAI itself, and the programs `kubeai`
and `load`. The first two layers are the same bytes from release to release while their packages
are.

Nothing of the image is executed but its Python, to compile byte code, so that one machine can make
the layers of every architecture. Called by release/image.py, by the Dockerfile and by the tests::

    python -m release.rootfs FOLDER WHEEL [ARCHITECTURE]
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from release.architectures import ARCHITECTURES, Architecture, machine

REPOSITORY = Path(__file__).resolve().parent.parent
SUITE = "trixie"
PYTHON = "3.13"
EXTRAS = "load,messaging,otel"
LAYERS = ("debian", "packages", "kubeai")
SITE = f"opt/kubeai/lib/python{PYTHON}/site-packages"
USER = "65532:65532"
PROGRAMS = {
    "opt/kubeai/bin/kubeai": "",
    "usr/local/bin/load": 'sys.argv[:1] = ["kubeai", "load"]\n',
}


# -- the layer of Debian's packages --------------------------------------------------------------

INCLUDED = (
    *("base-files", "ca-certificates", "netbase", "tzdata", "libstdc++6"),
    *(f"libpython{PYTHON}-stdlib", f"python{PYTHON}-minimal"),
)
# Dependencies of the above that nothing in the image needs: maintainer scripts (debconf, mawk,
# openssl), and modules of Python's library that KubeAI and its dependencies do not import.
EXCLUDED = (
    *("debconf", "mawk", "openssl", "openssl-provider-legacy", "readline-common"),
    *("libdb5.3t64", "libncursesw6", "libsqlite3-0"),
)
STANDARD_LIBRARY = f"usr/lib/python{PYTHON}"
NEEDLESS_FILES = (
    *("etc/resolv.conf", "etc/hostname", "etc/fstab"),  # this machine's, or templates
    *("etc/python3*", f"{STANDARD_LIBRARY}/sitecustomize.py"),  # Ubuntu's reports of crashes
    *("boot", "etc/apt", "etc/binfmt.d", "etc/dpkg", "etc/kernel", "etc/init.d", "etc/cron*"),
    *("etc/update-motd.d", "etc/profile.d", "etc/skel", "etc/ca-certificates", "etc/issue*"),
    *("usr/sbin/*", "usr/lib/*/gconv", "usr/lib/*/engines-3", "usr/lib/*/ossl-modules"),
    *("usr/lib/*/audit", "usr/lib/*/libmvec.so*", "usr/lib/binfmt.d", "usr/lib/valgrind"),
    *("usr/share/[!cdz]*", "usr/share/debconf", "usr/share/dict", "usr/share/ca-certificates"),
    *("usr/share/doc/*/[!c]*", "usr/share/doc/*/changelog*", "usr/share/doc/*/c[!o]*"),
    *("var/cache/*", "var/lib/apt", "var/lib/dpkg/[!s]*", "var/lib/dpkg/status", "var/log/*"),
    *(f"{STANDARD_LIBRARY}/{name}" for name in ("test", "idlelib", "pydoc_data", "_pyrepl")),
    *(f"{STANDARD_LIBRARY}/{name}" for name in ("curses", "sqlite3", "turtle*", "lib2to3")),
    *(
        f"{STANDARD_LIBRARY}/lib-dynload/{name}*"
        for name in ("_test", "_xxtest", "xx", "_ctypes_t")
    ),
    *(f"{STANDARD_LIBRARY}/lib-dynload/{name}*" for name in ("_dbm", "_curses", "_sqlite3")),
)
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
GENERATED_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n"
    "kubeai:x:65532:65532:kubeai:/nonexistent:/sbin/nologin\n",
    "etc/group": "root:x:0:\nkubeai:x:65532:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
# Where OpenSSL looks by default; Debian has these links in the package of the program openssl.
LINKS = {
    "usr/lib/ssl/cert.pem": f"/{CERTIFICATES}",
    "usr/lib/ssl/certs": "/etc/ssl/certs",
    "var/run": "/run",  # as base-files' script makes them
    "var/lock": "/run/lock",
}
# Runs when the packages have been downloaded. Scanners of images read these files.
_RECORD_PACKAGES = (  # one line, or mmdebstrap warns
    'set -eu; status=$1/var/lib/dpkg/status.d; mkdir -p "$status"; '
    'for package in "$1"/var/cache/apt/archives/*.deb; do '
    'name=$(dpkg-deb --field "$package" Package); '
    '{ dpkg-deb --field "$package"; echo "Status: install ok installed"; } >"$status/$name"; '
    'dpkg-deb --ctrl-tarfile "$package" | tar -xO ./md5sums >"$status/$name.md5sums" || true; '
    'dpkg-deb --fsys-tarfile "$package" | tar -t >"$status/$name.list"; done'
)


def download(architectures: Iterable[Architecture], folder: Path) -> dict[str, Path]:
    """Make tars of Debian's packages for :func:`build`, and map the architectures' names to them.

    One for this machine's architecture is always among them: its Python compiles.
    """
    archives = {}
    for each in sorted({*architectures, machine()}, key=lambda one: one.oci):
        archives[each.oci] = folder / f"{each.oci}.tar"
        _download(each, archives[each.oci])
    return archives


def _download(architecture: Architecture, archive: Path) -> None:
    """Make a tar of an architecture's packages for :func:`debian`.

    $DEBIAN_MIRROR: where from, such as a snapshot that has the packages of a former release.
    """
    mirror = os.environ.get("DEBIAN_MIRROR")
    command = [
        *("mmdebstrap", "--quiet", "--variant=extract", "--format=tar"),
        *(f"--architectures={architecture.oci}", f"--include={','.join(INCLUDED)}"),
        *(f"--extract-hook={_RECORD_PACKAGES}", "--skip=output/dev,output/mknod,check/qemu"),
        *(SUITE, str(archive), *([mirror] if mirror else [])),
    ]
    env = os.environ | {"SOURCE_DATE_EPOCH": "0"}
    subprocess.run(command, check=True, env=env, stdin=subprocess.DEVNULL)


def debian(archive: Path, folder: Path) -> None:
    """The layer of Debian's packages, from what :func:`download` made."""
    with tarfile.open(archive) as packages:
        packages.extractall(folder, filter="tar")
    folder.chmod(0o755)
    authorities = sorted((folder / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    (folder / CERTIFICATES).write_text("".join(path.read_text() for path in authorities))
    status = folder / "var/lib/dpkg/status.d"
    kept = {
        line
        for path in status.glob("*.list")
        if path.stem not in EXCLUDED
        for line in path.read_text().splitlines()
    }
    for name in EXCLUDED:
        for line in (status / f"{name}.list").read_text().splitlines():
            if line not in kept and not line.endswith("/"):
                (folder / line).unlink(missing_ok=True)
        (status / name).unlink()
        (status / f"{name}.md5sums").unlink()
    _remove(folder, [*NEEDLESS_FILES, "var/lib/dpkg/status.d/*.list"])
    for name, text in GENERATED_FILES.items():
        (folder / name).write_text(text)
    for name, target in LINKS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_dir():
            (folder / name).rmdir()
        (folder / name).symlink_to(target)
    for path in status.glob("*.md5sums"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(each for each in lines if (folder / each.split()[1]).exists()))
    _remove_empty(folder / "usr/share")


# -- the layers of Python packages ---------------------------------------------------------------

NEEDLESS_IN_PACKAGES = (
    *("bin", "**/tests", "**/*.pyx", "**/*.pxd", "**/*.pyi", "**/*.c", "**/*.h", "**/*.hrl"),
    *("*-stubs", "*.dist-info/direct_url.json", "*.dist-info/uv_cache.json", "*.lock", ".lock"),
    *("kubernetes_asyncio/**/*_test.py", "multidict/_testcapi*", "fsspec/tests"),
)
# Of the services that botocore describes, KubeAI uses SQS, and the others to get credentials.
BOTOCORE_SERVICES = ("signin", "sqs", "sso", "sso-oidc", "sts")


def packages(
    wheel: Path, architecture: Architecture, python: Sequence[str], layer: Path, own: Path
) -> None:
    """The layers of the Python packages and of KubeAI (``own``), from KubeAI's wheel.

    ``python``: the command that runs the image's Python; see :func:`interpreter`.
    """
    site = layer / SITE
    _install(wheel, architecture, site)
    _remove(site, NEEDLESS_IN_PACKAGES)
    services = site / "botocore/data"
    for folder in services.iterdir():
        if folder.is_dir() and folder.name not in BOTOCORE_SERVICES:
            shutil.rmtree(folder)
    for library in sorted(site.rglob("*.so*")):
        subprocess.run([architecture.strip, "--strip-unneeded", library], check=True)
    (own / SITE).mkdir(parents=True)
    for path in sorted(site.glob("kubeai*")):
        path.rename(own / SITE / path.name)
    # Tracebacks show lines of KubeAI and of Python's library; of the others, only their numbers.
    _compile(python, layer, site, "-b")
    for source in site.rglob("*.py"):
        source.unlink()
    _compile(python, own, own / SITE)
    for folder in (site, own / SITE):
        _rewrite_records(folder)
    _write_programs(layer, own)


def _install(wheel: Path, architecture: Architecture, site: Path) -> None:
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", site),
            *("--python-version", PYTHON, "--python-platform", architecture.platform),
            *("--constraints", constraints, "--build-constraints", constraints),
            *("--link-mode", "copy", "--no-config", f"{wheel}[{EXTRAS}]"),
        ],
        check=True,
    )


def _write_programs(layer: Path, own: Path) -> None:
    (layer / "opt/kubeai/bin").mkdir(parents=True)
    for name in ("python", "python3"):
        (layer / "opt/kubeai/bin" / name).symlink_to(f"/usr/bin/python{PYTHON}")
    (layer / "opt/kubeai/pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON}\n"
    )
    for name, extra in PROGRAMS.items():
        program = own / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            "#!/opt/kubeai/bin/python\nimport sys\n\nfrom kubeai.cli import main\n\n"
            f"{extra}main()\n"
        )
        program.chmod(0o755)


def _rewrite_records(site: Path) -> None:
    """Keep the lists of installed files true: what was removed is not in them."""
    for record in site.glob("*.dist-info/RECORD"):
        with record.open(newline="") as lines:
            rows = [row for row in csv.reader(lines) if (site / row[0]).exists()]
        stripped = {row[0] for row in rows if ".so" in Path(row[0]).name}
        with record.open("w", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(
                [row[0], "", ""] if row[0] in stripped else row for row in sorted(rows)
            )


# -- byte code -----------------------------------------------------------------------------------


def interpreter(layer: Path, architecture: Architecture) -> list[str]:
    """The command that runs the Python of a layer of Debian outside of it, on this machine."""
    return [
        *("env", "-i", f"PYTHONHOME={layer / 'usr'}", "PYTHONHASHSEED=0", "PYTHONNOUSERSITE=1"),
        "PYTHONDONTWRITEBYTECODE=1",  # or its own modules' files would be kept, which have a time
        *(str(layer / architecture.loader), "--library-path", str(layer / architecture.libraries)),
        *(str(layer / f"usr/bin/python{PYTHON}"), "-S"),
    ]


def _compile(python: Sequence[str], layer: Path, folder: Path, *options: str) -> None:
    """Compile modules, in one process, because the bytes depend on what was compiled before."""
    compileall = ["-m", "compileall", "-q", "-f", "-j1", "--invalidation-mode", "unchecked-hash"]
    places = ["-s", str(layer), "-p", "/", *options, str(folder)]
    subprocess.run([*python, *compileall, *places], check=True)


# -- all layers ----------------------------------------------------------------------------------


def build(
    archives: dict[str, Path], wheel: Path, architecture: Architecture, folder: Path
) -> list[Path]:
    """Make the layers in ``folder``, which is empty or missing.

    ``archives``: what :func:`download` made.
    """
    layers = [folder / name for name in LAYERS]
    for layer in layers:
        layer.mkdir(parents=True)
    debian(archives[architecture.oci], layers[0])
    own = machine()
    runner = layers[0]
    if architecture != own:
        runner = folder / "runner"
        debian(archives[own.oci], runner)
    python = interpreter(runner, own)
    _compile(python, layers[0], layers[0] / STANDARD_LIBRARY)
    packages(wheel, architecture, python, layers[1], layers[2])
    if architecture != own:
        shutil.rmtree(runner)
    return layers


def merge(layers: Iterable[Path], root: Path) -> None:
    """Copy layers over each other, as a container engine mounts them."""
    for layer in layers:
        shutil.copytree(layer, root, symlinks=True, dirs_exist_ok=True)


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        # glob() finds no link by its whole name if what it leads to is not on this machine.
        found = folder.glob(pattern) if set(pattern) & set("*[") else [folder / pattern]
        for path in list(found):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    for path in sorted(_folders(folder), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())


def main(folder: str, wheel: str, architecture: str = "") -> None:
    """Make the layers of one architecture, this machine's by default."""
    chosen = ARCHITECTURES[architecture] if architecture else machine()
    Path(folder).mkdir(parents=True, exist_ok=True)
    archives = download([chosen], Path(folder))
    build(archives, Path(wheel).resolve(), chosen, Path(folder))
    for archive in archives.values():
        archive.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
