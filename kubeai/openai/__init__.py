"""The formats of OpenAI's and Anthropic's APIs: requests, routes and errors. Pure: no I/O."""
