"""The limits of API keys, as the gateway applies them to a request."""

from kubeai._keys import Key
from kubeai._limits import Charge
from kubeai._prompt import Prompt
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import InferenceRequest

OUTPUT_TOKENS: int  # that a response is expected to have if nothing is known

def expected_tokens(key: Key | None, prompt: Prompt, request: InferenceRequest) -> int:
    """The tokens that a request is expected to use: its prompt, and its response.

    The response is expected to have as many tokens as the body allows; if it does not say, as many
    as those to this key (None: ``OUTPUT_TOKENS``) had on average, and at most what the key's limit
    of a minute leaves beside the prompt.
    """

def learn_output(key: Key, tokens: int) -> None:
    """Learn how long the key's responses are from one whose request has ended before it."""

def refusal(key: Key, charge: Charge) -> ErrorResponse:
    """The 429 for a request that exceeds a limit of its key; it says which one."""
