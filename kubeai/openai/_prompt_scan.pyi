"""What a pick needs to know of a request's prompt: its length, and hashes of its beginnings."""

from kubeai._pick import Picker
from kubeai._prompt import Prompt
from kubeai.openai._body_scan import InferenceRequest

def prompt_of(picker: Picker, request: InferenceRequest, complete: bool = False) -> Prompt:
    """The prompt of a request, with what the picker's strategy uses, or what any strategy uses.

    Under LeastLoad only the length, under PrefixHash the hash key and the blocks, under PrefixCache
    the blocks. An upload, and a request for which an engine computes no prompt, has an empty prompt
    without a key. ``complete``: the hash key and the blocks under each strategy, for the access
    log.
    """
