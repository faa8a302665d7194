"""``kubeai openapi``: the OpenAPI document of the gateway's HTTP API."""


def openapi() -> None:
    """Print the OpenAPI document of the gateway's HTTP API, as JSON."""
    import msgspec

    from kubeai.gateway.openapi import document_json

    print(msgspec.json.format(document_json(), indent=2).decode())
