"""The formats of OpenAI's, Anthropic's and Ollama's APIs: requests, routes, errors. No I/O."""
