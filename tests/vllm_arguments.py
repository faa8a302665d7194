"""Record the arguments of vLLM's server, for tests/unit/podspec/test_catalogue.py.

    python tests/vllm_arguments.py tests/unit/podspec/vllm_arguments.json

Run it in an environment with vLLM (the build for CPUs is enough). It adds that version to the file,
which keeps only the arguments and choices that all recorded versions accept. Delete the file to
start over.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

Argument = dict[str, Any]
# Where vLLM keeps a thing, in the order of its versions.
PARSERS = (
    ("vllm.entrypoints.launchers.cli_args", "make_arg_parser"),
    ("vllm.entrypoints.openai.cli_args", "make_arg_parser"),
)
PARSER_CLASSES = (
    ("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    ("vllm.utils", "FlexibleArgumentParser"),
)
# Choices that the parser leaves to the code behind it.
REGISTRIES = {
    "--load-format": (("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"),),
    "--quantization": (("vllm.model_executor.layers.quantization", "QUANTIZATION_METHODS"),),
    "--tool-call-parser": (
        ("vllm.tool_parsers", "ToolParserManager"),
        ("vllm.entrypoints.openai.tool_parsers", "ToolParserManager"),
    ),
    "--reasoning-parser": (("vllm.reasoning", "ReasoningParserManager"),),
}
VARIABLES = (("vllm.envs", "environment_variables"),)


def find(places: tuple[tuple[str, str], ...]) -> Any:
    for module, name in places:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"this vLLM has none of {places}")


def registered(flag: str) -> list[str]:
    registry = find(REGISTRIES[flag])
    if hasattr(registry, "list_registered"):
        return list(registry.list_registered())
    for attribute in ("tool_parsers", "reasoning_parsers"):
        registry = getattr(registry, attribute, registry)
    return list(registry)


def described(flag: str, action: argparse.Action) -> Argument:
    value = {None: "yes", 0: "no", "?": "optional"}.get(action.nargs, "yes")
    choices = registered(flag) if flag in REGISTRIES else action.choices
    if choices is None:
        return {"value": value}
    return {"value": value, "choices": sorted(str(choice) for choice in choices)}


def arguments() -> dict[str, Argument]:
    parser = find(PARSERS)(find(PARSER_CLASSES)())
    return {
        flag: described(flag, action)
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }


def common(one: dict[str, Argument], other: dict[str, Argument]) -> dict[str, Argument]:
    both = {flag: dict(one[flag]) for flag in one.keys() & other.keys()}
    both = {flag: a for flag, a in both.items() if a["value"] == other[flag]["value"]}
    for flag, argument in both.items():
        lists = [a["choices"] for a in (one[flag], other[flag]) if "choices" in a]
        if lists:
            argument["choices"] = sorted(set(lists[0]).intersection(*lists))
    return both


def text(facts: dict[str, Any]) -> str:
    """One line an argument or variable, so that a diff can be read."""
    lines = [
        f"    {json.dumps(flag)}: {json.dumps(argument)}"
        for flag, argument in sorted(facts["arguments"].items())
    ]
    variables = [f"    {json.dumps(name)}" for name in facts["variables"]]
    return (
        "{\n"
        f'  "versions": {json.dumps(facts["versions"])},\n'
        '  "variables": [\n' + ",\n".join(variables) + "\n  ],\n"
        '  "arguments": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )


def main(path: Path) -> None:
    import vllm

    facts = {
        "versions": [vllm.__version__],
        "variables": sorted(name for name in find(VARIABLES) if name.startswith("VLLM_")),
        "arguments": arguments(),
    }
    if path.exists():
        known = json.loads(path.read_text())
        facts = {
            "versions": sorted({*known["versions"], *facts["versions"]}),
            "variables": sorted(set(known["variables"]).intersection(facts["variables"])),
            "arguments": common(known["arguments"], facts["arguments"]),
        }
    path.write_text(text(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
