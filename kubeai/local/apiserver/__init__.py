"""The embedded Kubernetes API: a generic object store that speaks Kubernetes over HTTPS.

It runs as a process of its own (``python -m kubeai.local.apiserver``), started by ``kubeai local``.
Bottom up:

- ``status``: the errors a client sees (metav1.Status);
- ``selectors``, ``patch``, ``schema``, ``printing``: pure functions on objects;
- ``resources``, ``openapi``: which resources there are, and how that is told to clients;
- ``store``: objects, revisions and recent events, in memory and in SQLite;
- ``registry``: the rules of create, update and delete; ``collector``: what happens afterwards
  (garbage collection, namespaces, old Events);
- ``server``: HTTP in front of the registry; ``watching``, ``podlogs``: its two streams;
- ``protobuf``: the other form that Go clients send objects in;
- ``credentials``: token, certificates and kubeconfig.
"""
