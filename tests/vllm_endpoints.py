"""Every HTTP endpoint of vLLM's server, and whether clients of the gateway may use it.

    python tests/vllm_endpoints.py FOLDER

prints the endpoints of the vLLM in FOLDER (site-packages/vllm) that have no decision here, and
those here that it does not have. Run it with each new version;
tests/unit/gateway/test_vllm_endpoints.py holds the gateway to the decisions.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

VERSION = "0.32.0"

# Inference, for clients: the gateway serves these.
CLIENTS = (
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/batch",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/systemone",
    "POST /v1/embeddings",
    "POST /v2/embed",
    "POST /pooling",
    "POST /classify",
    "POST /score",
    "POST /v1/score",
    "POST /rerank",
    "POST /v1/rerank",
    "POST /v2/rerank",
    "POST /generative_scoring",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/audio/transcriptions",
    "POST /v1/audio/translations",
    "WEBSOCKET /v1/realtime",
)
# The gateway answers these itself: about all models, and about its own readiness.
GATEWAY = ("GET /v1/models", "GET /readyz")
# An operator's: they change the engine, or say what it does.
OPERATORS = (
    "GET /health",
    "GET /load",
    "GET /version",
    "GET /metrics",
    "GET /ping",
    "POST /ping",
    "GET /ready",
    "GET /server_info",
    "GET /tokenizer_info",
    "GET /kv_event_sources",
    "GET /docs",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /sleep",
    "POST /wake_up",
    "GET /is_sleeping",
    "POST /release_kv_cache_memory",
    "POST /reset_prefix_cache",
    "POST /reset_mm_cache",
    "POST /reset_encoder_cache",
    "POST /collective_rpc",
    "POST /start_profile",
    "POST /stop_profile",
    "POST /scale_elastic_ep",
    "POST /is_scaling_elastic_ep",
    "POST /fault_tolerance/apply",
    "GET /fault_tolerance/status",
    "POST /pause",
    "POST /resume",
    "GET /is_paused",
    "POST /abort_requests",
    "POST /init_weight_transfer_engine",
    "POST /shutdown_weight_transfer_engine",
    "POST /start_weight_update",
    "POST /start_draft_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /update_weight_version",
    "GET /weight_info",
    "POST /weight_checker",
    "GET /get_world_size",
)
# Between the parts of a server that is spread over several processes: prompts that are rendered
# in one and computed in another.
ENGINES = (
    "POST /inference/v1/generate",
    "POST /v1/chat/completions/render",
    "POST /v1/chat/completions/derender",
    "POST /v1/completions/render",
    "POST /v1/completions/derender",
    "POST /v1/messages/render",
    "POST /v1/responses/render",
    "POST /cohere/v2/chat/render",
)
# The same requests as above in the envelope of another platform, or behind a switch that is off.
OTHER_PLATFORMS = (
    "POST /invocations",  # SageMaker's
    "POST /cohere/v2/chat",  # needs VLLM_ENABLE_COHERE_API and Cohere's package
)
NOT_FOR_CLIENTS = (*OPERATORS, *ENGINES, *OTHER_PLATFORMS)

_METHODS = ("get", "post", "put", "delete", "patch", "websocket")
_MOUNTED = frozenset(("GET /metrics",))  # not declared by a decorator


def declared(folder: Path) -> set[str]:
    """The endpoints that vLLM declares by decorators, as ``METHOD /path``."""
    found = set()
    for file in sorted((folder / "entrypoints").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in node.decorator_list:
                    match decorator:
                        case ast.Call(
                            func=ast.Attribute(attr=method),
                            args=[ast.Constant(value=str(path)), *_],
                        ) if method in _METHODS:
                            found.add(f"{method.upper()} {path}")
    return found


def main(folder: str) -> int:
    """Compare with an installed vLLM; the exit status is 1 if there are differences."""
    known = {*CLIENTS, *GATEWAY, *NOT_FOR_CLIENTS}
    found = declared(Path(folder)) | _MOUNTED
    for endpoint in sorted(found - known):
        print(f"no decision: {endpoint}")
    for endpoint in sorted(known - found):
        print(f"not in this vLLM: {endpoint}")
    return int(found != known)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
