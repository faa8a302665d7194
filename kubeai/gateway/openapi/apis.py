"""Which API each kind of request belongs to, and what it does, in a sentence."""

from __future__ import annotations

from typing import NamedTuple

from kubeai.openai.routes import Kind

OPENAI = "https://platform.openai.com/docs/api-reference"
VLLM = "https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html"
ANTHROPIC = "https://docs.anthropic.com/en/api"
OLLAMA = "https://github.com/ollama/ollama/blob/main/docs/api.md"
COHERE = "https://docs.cohere.com/reference"

TEXT, RANKING = "Text", "Embeddings and ranking"
AUDIO, IMAGES, OLLAMA_TAG = "Audio", "Images", "Ollama"
MODELS, GATEWAY, CONSOLE = "Models", "Gateway", "Console"
TAGS = {
    TEXT: "Generate text, and count tokens.",
    RANKING: "Embed, rank, score and classify texts.",
    AUDIO: "Speech to text, text to speech, and realtime sessions.",
    IMAGES: "Generate and edit images.",
    OLLAMA_TAG: "Ollama's own API, for Models whose engine has it.",
    MODELS: "Which Models there are. The gateway answers; no replica is started.",
    GATEWAY: "Health, and this document.",
    CONSOLE: "Log in to the console. Only if the console is enabled and keys are required.",
}


class Api(NamedTuple):
    """What a kind of request does. ``docs``: the API that its bodies follow; empty: KubeAI's."""

    tag: str
    summary: str
    docs: str = ""


APIS: dict[Kind, Api] = {
    Kind.CHAT: Api(TEXT, "Create a chat completion", f"{OPENAI}/chat"),
    Kind.CHAT_BATCH: Api(TEXT, "Create chat completions for several conversations", VLLM),
    Kind.COMPLETIONS: Api(TEXT, "Create a completion", f"{OPENAI}/completions"),
    Kind.RESPONSES: Api(TEXT, "Create a response", f"{OPENAI}/responses"),
    Kind.STORED_RESPONSE: Api(TEXT, "Get a stored response", f"{OPENAI}/responses"),
    Kind.CANCEL_RESPONSE: Api(TEXT, "Cancel a stored response", f"{OPENAI}/responses"),
    Kind.MESSAGES: Api(TEXT, "Create a message", f"{ANTHROPIC}/messages"),
    Kind.COUNT_TOKENS: Api(
        TEXT, "Count the tokens of a message", f"{ANTHROPIC}/messages-count-tokens"
    ),
    Kind.SYSTEM_ONE: Api(TEXT, "Make a structured decision", VLLM),
    Kind.TOKENIZE: Api(TEXT, "Convert text to tokens", VLLM),
    Kind.DETOKENIZE: Api(TEXT, "Convert tokens to text", VLLM),
    Kind.EMBEDDINGS: Api(RANKING, "Create embeddings", f"{OPENAI}/embeddings"),
    Kind.EMBED_V2: Api(RANKING, "Create embeddings (Cohere's API)", f"{COHERE}/embed"),
    Kind.RERANK: Api(
        RANKING, "Rank documents by a query (Jina's and Cohere's API)", f"{COHERE}/rerank"
    ),
    Kind.SCORE: Api(RANKING, "Score pairs of texts", VLLM),
    Kind.GENERATIVE_SCORING: Api(RANKING, "Score items with a generative model", VLLM),
    Kind.POOLING: Api(RANKING, "Get a pooling model's output", VLLM),
    Kind.CLASSIFY: Api(RANKING, "Classify texts", VLLM),
    Kind.SPEECH: Api(AUDIO, "Convert text to speech", f"{OPENAI}/audio/createSpeech"),
    Kind.TRANSCRIPTIONS: Api(
        AUDIO, "Transcribe an audio file", f"{OPENAI}/audio/createTranscription"
    ),
    Kind.TRANSLATIONS: Api(AUDIO, "Translate an audio file", f"{OPENAI}/audio/createTranslation"),
    Kind.REALTIME: Api(AUDIO, "Open a realtime session (a WebSocket)", f"{OPENAI}/realtime"),
    Kind.IMAGES: Api(IMAGES, "Generate images", f"{OPENAI}/images/create"),
    Kind.IMAGE_EDITS: Api(IMAGES, "Edit an image", f"{OPENAI}/images/createEdit"),
    Kind.IMAGE_VARIATIONS: Api(
        IMAGES, "Create variations of an image", f"{OPENAI}/images/createVariation"
    ),
    Kind.OLLAMA_CHAT: Api(OLLAMA_TAG, "Create a chat message", OLLAMA),
    Kind.OLLAMA_GENERATE: Api(OLLAMA_TAG, "Generate text", OLLAMA),
    Kind.OLLAMA_EMBED: Api(OLLAMA_TAG, "Create embeddings", OLLAMA),
    Kind.OLLAMA_EMBEDDINGS: Api(OLLAMA_TAG, "Create an embedding (superseded)", OLLAMA),
    Kind.OLLAMA_TAGS: Api(OLLAMA_TAG, "List the Models that Ollama's clients can use", OLLAMA),
    Kind.OLLAMA_PS: Api(OLLAMA_TAG, "List those that have a ready replica", OLLAMA),
    Kind.OLLAMA_SHOW: Api(OLLAMA_TAG, "Describe a Model", OLLAMA),
    Kind.OLLAMA_VERSION: Api(OLLAMA_TAG, "Get the version of Ollama's API", OLLAMA),
    Kind.MODELS: Api(MODELS, "List the Models, aliases and adapters", f"{OPENAI}/models"),
}
