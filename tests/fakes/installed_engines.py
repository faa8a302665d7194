"""Programs and virtual environments of engines, none of which can run."""

from pathlib import Path

NOTHING = "#!/bin/sh\nexit 1\n"


def program(path: Path, content: str = NOTHING) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return str(path)


def environment(folder: Path, module: str, distribution: str, version: str = "1.0") -> Path:
    """A virtual environment whose Python cannot run, with a package installed in it."""
    program(folder / "bin" / "python3")
    (folder / "pyvenv.cfg").write_text("")
    packages = folder / "lib" / "python3.12" / "site-packages"
    (packages / module).mkdir(parents=True)
    (packages / module / "__init__.py").write_text("raise RuntimeError('imported')")
    info = packages / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,sha256=x,1\n")
    return folder
