"""The embedded Kubernetes API: a generic object store that speaks Kubernetes over HTTPS.

It runs as a process of its own (``python -m kubeai.local.apiserver``), started by ``kubeai local``.
Bottom up:

- ``status``: the errors a client sees (metav1.Status);
- ``selectors``, ``patch``, ``schema``, ``printing``: pure functions on objects;
- ``ownership``: sets of fields, who owns which, and what an apply makes of an object; ``managers``:
  the same for the resources that there are;
- ``resources``, ``openapi``: which resources there are, and how that is told to clients;
- ``store``: objects, revisions and recent events, in memory and in SQLite;
- ``registry``: the rules of create, update and delete; ``collector``: what happens afterwards
  (garbage collection, namespaces, old Events);
- ``server``: HTTP in front of the registry; ``watching``, ``podlogs``: its two streams;
- ``bodies``, ``protobuf``: the forms that clients send objects in;
- ``credentials``: token, certificates and kubeconfig.
"""
