"""The names of Models: which one a request means, and how its engine and its client call it."""

from kubeai.gateway.relay._renaming import Renaming
from kubeai.openai._body_scan import InferenceRequest
from kubeai.routing.table import RoutedModel

def find_model(
    models: dict[str, RoutedModel], aliases: dict[str, str], request: InferenceRequest
) -> RoutedModel | None:
    """The Model that serves a request, whose ``name`` and ``adapter`` are set accordingly.

    ``models``: by name. ``aliases``: the name of the Model that each belongs to. In this order,
    ``model`` is the name of a Model, ``<Model>_<adapter>`` with an adapter that the Model declares,
    an alias, or ``<alias>_<adapter>``. None: nothing has this name. Calling it again is harmless.
    """

def renaming_of(request: InferenceRequest) -> Renaming | None:
    """Gives responses the name that the client used; None if the engine uses it as well."""

def bucket_of(model: str, who: bytes) -> int:
    """Where a client is among 100 equal parts of a Model's clients: 0 to 99.

    The same for each process and release. The parts of two Models are independent.
    """

def prompt_id(request: InferenceRequest) -> bytes | None:
    """Identifies the beginning of a request's prompt; None if it has none."""
