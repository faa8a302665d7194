"""YAML as the Kubernetes API decodes it, with limits for texts from clients. Pure.

:func:`check_structure` comes first: it rejects what would take the decoder down. :class:`Loader`
then decodes. Called by the embedded API server and the console; ``kubeai local`` reads its
manifests with the same ``RESOLVERS``.
"""

from __future__ import annotations

import yaml

DEPTH_MAX = 100
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
# Like Kubernetes, decode what looks like a date as a string.
RESOLVERS = {
    first: [pair for pair in pairs if pair[0] != _TIMESTAMP]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# libyaml's, where PyYAML has been built with it: ten times as fast.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Decodes a text that `check_structure` has accepted."""

    yaml_implicit_resolvers = RESOLVERS


def check_structure(text: str | bytes) -> None:
    """ValueError for aliases and deep nesting; yaml.YAMLError for what is not YAML.

    Nested aliases expand a few bytes without bound. Deep nesting would overflow the stack of the C
    library, which recurses.
    """
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            raise ValueError(f"YAML is nested more than {DEPTH_MAX} levels deep")
