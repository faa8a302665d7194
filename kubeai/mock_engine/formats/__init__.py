"""The mock engine's APIs: parsing requests and formatting responses. Pure; one module per API.

Four APIs generate text (OpenAI's chat completions, completions and responses, and Anthropic's
messages); each is a :class:`~kubeai.mock_engine.formats.base.ApiFormat`. Requests are parsed to a
common ``GenerationRequest``; responses are formatted from it and the replies. Embeddings, rerank
and transcription have their own functions.
"""
