"""The OpenAPI document of the gateway's HTTP API, served at ``/openapi.json``.

It is made from what the gateway itself uses: the route table and the methods of each route, the
shapes by which request bodies are read, the types of its responses, and the errors (errors.py). The
APIs behind the routes belong to others: their bodies are open objects, with the members that KubeAI
reads and a link to the API. Called by local_routes.py when the document is first requested, and by
``kubeai openapi``.
"""

from kubeai.gateway.openapi.document import document, document_json

__all__ = ["document", "document_json"]
