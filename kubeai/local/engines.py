"""The engines that are installed on this machine: where they are, and their versions.

An engine's program is looked up in the Model's ``spec.env.PATH``, in the environment named by
``--engine-env``, in KubeAI's own environment, and on PATH, in that order. Used by `kubeai local`
for its list at start and for ``--model``, by `kubeai doctor`, and by the kubelet to run containers.

No engine is imported. A Python that is not in a virtual environment is run to report its module
path.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec

from kubeai.api.model import Engine
from kubeai.local.engine_versions import REPORT_TIMEOUT_S, package_version, reported_version
from kubeai.local.kubelet.runtime.children import run_helper

QUERY_AGE_MAX_S = 1.0  # then the interpreter is run again: more may be installed
ENGINES: tuple[Engine, ...] = get_args(Engine)
MOCK_IMAGE = "kubeai/mock-engine"


class Program(msgspec.Struct, frozen=True):
    """An engine's program: a script on PATH, or a module that a Python runs with ``-m``."""

    title: str
    install: str  # how to install it
    script: str = ""  # of a module: beside the Python that has it
    module: str = ""
    package: str = ""  # Python package whose version is the program's


PROGRAMS: dict[Engine, Program] = {
    "VLLM": Program("vLLM", "pip install vllm", "vllm", "vllm", "vllm"),
    "OLlama": Program("Ollama", "see https://ollama.com/download", "ollama"),
    "FasterWhisper": Program(
        "FasterWhisper",
        "see https://speaches.ai/installation; pip's faster-whisper-server is another program",
        module="speaches",
        package="speaches",
    ),
    "Infinity": Program(
        "Infinity", "pip install 'infinity-emb[all]'", "infinity_emb", package="infinity_emb"
    ),
    "SGLang": Program("SGLang", "pip install sglang", "sglang", module="sglang", package="sglang"),
    "LlamaCpp": Program(
        "llama.cpp",
        "see https://github.com/ggml-org/llama.cpp/blob/master/docs/install.md",
        "llama-server",
    ),
}


class _Former(NamedTuple):
    """A server's former name, under which it can still be installed."""

    engine: Engine
    image: str  # by whose name Models choose it


# By module. FasterWhisper's server was renamed to speaches.
_FORMER = {"faster_whisper_server": _Former("FasterWhisper", "faster-whisper-server")}
# The file that shows that a folder is the engine's module and no other of that name.
_MARKERS = {"faster_whisper_server": "main.py"}
_MARKER = "__init__.py"

EngineEnvs = Mapping[Engine, Path]  # from --engine-env


class Found(msgspec.Struct, frozen=True):
    """One engine on this machine. Without a ``program`` it is not installed."""

    engine: Engine
    title: str
    hint: str  # how to install it
    program: str = ""  # path of the program, or of the Python that has it
    version: str = ""  # empty if unknown
    source: str = ""  # where it was found: an option, PATH, or a Model's PATH
    image: str = ""  # the image by which a Model must choose it; empty: the default one runs it


class ModelPath(msgspec.Struct, frozen=True):
    """A Model that sets ``spec.env.PATH``."""

    name: str
    engine: Engine
    path: str


def engine_of(program: str) -> Engine | None:
    """The engine that has a module or script of this name."""
    for engine, known in PROGRAMS.items():
        if program and program in (known.module, known.script):
            return engine
    former = _FORMER.get(program)
    return former.engine if former else None


def former_modules(engine: Engine) -> list[str]:
    """The modules of an engine's server under former names."""
    return [module for module, former in _FORMER.items() if former.engine == engine]


# -- lookup ----------------------------------------------------------------------------------------


class Location(msgspec.Struct, frozen=True):
    """Where a program was found."""

    program: str
    source: str
    module_path: tuple[str, ...] = ()  # directories with Python packages


def locate_script(
    script: str, envs: EngineEnvs, path: str, model_path: str = ""
) -> Location | None:
    """Find an engine's script. ``path``: this process's PATH; ``model_path``: the Model's own."""
    engine = engine_of(script)
    directory = envs.get(engine) if engine else None
    places = (
        (model_path, "spec.env.PATH"),
        (str(directory / "bin") if directory else "", "--engine-env"),
        (str(Path(sys.executable).parent), "KubeAI's environment"),
        (path, "PATH"),
    )
    for where, source in places:
        if where and (found := shutil.which(script, path=where)):
            python = str(Path(found).resolve().parent / "python3")
            return Location(found, source, tuple(map(str, _site_packages(python))))
    return None


async def locate_module(
    module: str, envs: EngineEnvs, path: str, model_path: str = ""
) -> Location | None:
    """Find a Python that has an engine's module. The arguments are those of `locate_script`."""
    engine = engine_of(module)
    directory = envs.get(engine) if engine else None
    for python in _pythons(module, model_path):
        if (module_path := await find_module_path(python, module)) is not None:
            return Location(python, "spec.env.PATH", module_path)
    if directory is not None:
        python = str(directory / "bin" / "python3")
        if (module_path := await find_module_path(python, module)) is not None:
            return Location(python, "--engine-env", module_path)
    importlib.invalidate_caches()  # it may have been installed in the meantime
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None and _is_engine(Path(spec.origin), module):
        return Location(sys.executable, "KubeAI's environment", tuple(sys.path))
    for python in _pythons(module, path):
        if (module_path := await find_module_path(python, module)) is not None:
            return Location(python, "PATH", module_path)
    return None


def _pythons(module: str, path: str) -> Iterator[str]:
    """Interpreters on a PATH: that of the module's script, in its own environment, and python3."""
    if not path:
        return
    if script := shutil.which(module, path=path):
        yield str(Path(script).resolve().parent / "python3")
    if python := shutil.which("python3", path=path):
        yield python


ModulePath = tuple[str, ...]  # the directories in which a Python looks for modules
_module_paths: dict[tuple[str, str], ModulePath] = {}  # (interpreter, module) → its path
# The latest query of each interpreter, and when it began (CLOCK_MONOTONIC seconds).
_queries: dict[str, tuple[float, asyncio.Task[tuple[list[str], ModulePath]]]] = {}


async def find_module_path(python: str, module: str) -> ModulePath | None:
    """The directories in which an interpreter looks for modules; None if it lacks ``module``.

    ``python``: path of the interpreter. Those of a virtual environment are found without running
    it. Any other interpreter is run, once for all callers within ``QUERY_AGE_MAX_S``.
    """
    if not os.access(python, os.X_OK):
        return None
    if (known := _module_paths.get((python, module))) is not None:
        return known
    folders = _site_packages(python)
    if any(_holds(folder, module) for folder in folders):
        return tuple(map(str, folders))
    begun_s, query = _queries.get(python, (-math.inf, None))
    if query is None or time.monotonic() - begun_s > QUERY_AGE_MAX_S:
        query = asyncio.create_task(_query(python))
        _queries[python] = time.monotonic(), query
    modules, path = await asyncio.shield(query)
    if module not in modules:
        return None
    _module_paths[python, module] = path
    return path


async def _query(python: str) -> tuple[list[str], ModulePath]:
    """Run an interpreter: which of the engines' modules it has, and its module path."""
    modules = [*filter(None, (known.module for known in PROGRAMS.values())), *_FORMER]
    markers = {module: _MARKERS.get(module, _MARKER) for module in modules}
    program = (
        "import importlib.util as u,os,sys;"
        f"print(*(m for m,f in {markers!r}.items() if (s:=u.find_spec(m)) and s.origin"
        " and os.path.exists(os.path.join(os.path.dirname(s.origin),f))));"
        "print(*sys.path,sep='\\n')"
    )
    _, output = await run_helper([python, "-c", program], REPORT_TIMEOUT_S)
    found, *path = output.splitlines() or [""]
    return found.split(), tuple(filter(None, path))


def _site_packages(python: str) -> list[Path]:
    """The package directories of a virtual environment, without starting its Python."""
    prefix = Path(python).parent.parent
    if not (prefix / "pyvenv.cfg").is_file() and not (prefix / "conda-meta").is_dir():
        return []
    return sorted(prefix.glob("lib/python3*/site-packages"))


def _holds(folder: Path, module: str) -> bool:
    return _is_engine(folder / module / _MARKER, module)


def _is_engine(init: Path, module: str) -> bool:
    """Whether a module is an engine's, from its ``__init__.py``."""
    return init.with_name(_MARKERS.get(module, _MARKER)).is_file()


# -- the list --------------------------------------------------------------------------------------


async def survey(envs: EngineEnvs, path: str, model_paths: Sequence[ModelPath] = ()) -> list[Found]:
    """List the engines of this machine: one entry for each, installed or not.

    An engine that is only on a Model's own PATH gets an entry of its own. Takes at most about
    ``REPORT_TIMEOUT_S`` for each interpreter on PATH, and usually a few milliseconds.
    """
    found = await asyncio.gather(*(_find(engine, envs, path) for engine in ENGINES))
    theirs = await asyncio.gather(*(_find_for(model) for model in model_paths))
    known = {one.program for one in found}
    others = {one.program: one for one in theirs if one is not None and one.program not in known}
    listed = []
    for one in found:
        further = [other for other in others.values() if other.engine == one.engine]
        listed += further if further and not one.program else [one, *further]
    return listed


async def _find(engine: Engine, envs: EngineEnvs, path: str, model_path: str = "") -> Found:
    known = PROGRAMS[engine]
    if known.module:
        where = await locate_module(known.module, envs, path, model_path)
    else:
        where = locate_script(known.script, envs, path, model_path)
    package, image = known.package, ""
    for former in former_modules(engine) if where is None else ():
        where = await locate_module(former, envs, path, model_path)
        package, image = former, _FORMER[former].image
    if where is None and known.module and known.script:
        where = locate_script(known.script, envs, path, model_path)
    if where is None:
        return Found(engine, known.title, known.install)
    if package:
        version = package_version(where.module_path, package)
    else:
        version = await reported_version(where.program)
    source = f"{where.source}; for Models with image: {image}" if image else where.source
    return Found(engine, known.title, known.install, where.program, version, source, image)


async def _find_for(model: ModelPath) -> Found | None:
    """The engine on a Model's own PATH."""
    found = await _find(model.engine, {}, "", model.path)
    where, *more = found.source.partition(";")
    if where != "spec.env.PATH":
        return None
    source = "".join((f"{where} of Model {model.name}", *more))
    return msgspec.structs.replace(found, source=source)
