"""The values of ``--engine-env``: the environment or directory of an engine.

Used by `kubeai local` and `kubeai doctor`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from kubeai.api.config.strict import did_you_mean
from kubeai.api.model import Engine
from kubeai.errors import KubeAIError, quoted
from kubeai.local.engines import ENGINES, PROGRAMS, find_module_path, former_modules


async def read_engine_envs(values: Sequence[str]) -> dict[Engine, Path]:
    """Parse and check the values of ``--engine-env``, each ``NAME=DIR``. KubeAIError if invalid."""
    envs: dict[Engine, Path] = {}
    for value in values:
        engine, directory = _parse_engine_env(value)
        if engine in envs:
            raise _bad(value, f"{engine} is given twice")
        envs[engine] = directory
    await asyncio.gather(*(_check_engine_env(*item) for item in envs.items()))
    return envs


def _parse_engine_env(value: str) -> tuple[Engine, Path]:
    name, equals, directory = value.partition("=")
    if not equals or not directory:
        raise _bad(value, "must be NAME=DIR, such as VLLM=/opt/vllm")
    by_name = {engine.lower(): engine for engine in ENGINES}
    engine = by_name.get(name.lower())
    if engine is None:
        raise _bad(value, f"unknown engine {quoted(name)}{did_you_mean(name, ENGINES)}")
    path = Path(directory).expanduser().absolute()
    if not path.is_dir():
        raise _bad(value, f"{path} is not a directory")
    return engine, path


async def _check_engine_env(engine: Engine, directory: Path) -> None:
    """Check that a directory is an environment that holds the engine's program."""
    value, program = f"{engine}={directory}", PROGRAMS[engine]
    python = str(directory / "bin" / "python3")
    if program.package and not os.access(python, os.X_OK):
        raise _bad(value, f"{directory} is not a virtual environment: it has no bin/python3")
    if not program.module:
        if not os.access(directory / "bin" / program.script, os.X_OK):
            what = f"{directory} has no program bin/{program.script}"
            raise _bad(value, f"{what}; install it there ({program.install})")
        return
    names = (program.module, *former_modules(engine))
    for name in names:
        if await find_module_path(python, name) is not None:
            return
    what = f"{program.title} (module {' or '.join(names)}) is not installed in {directory}"
    raise _bad(value, f"{what}; install it there ({program.install})")


def _bad(value: str, problem: str) -> KubeAIError:
    return KubeAIError(f"--engine-env {value}: {problem}")
