"""The embedded Kubernetes API: a generic object store that serves the Kubernetes API over HTTPS.

``kubeai local`` starts it as a separate process (``python -m kubeai.local.apiserver``).
From the bottom up:

- ``status``: the errors that clients see (metav1.Status);
- ``selectors``, ``patch``, ``schema``, ``printing``: pure functions on objects;
- ``ownership``: field sets, their owners and server-side apply; ``managers`` applies these to the
  served resources;
- ``resources``, ``discovery``, ``openapi_v2``: the served resources and their discovery documents;
- ``store``: objects, revisions and recent events, in memory and in SQLite;
- ``registry``: the rules of create, update and delete; ``collector``: background work (garbage
  collection, namespace deletion, expiry of Events);
- ``server``: HTTP on top of the registry; ``watching``: lists and watches; ``kubelets``: pod logs
  and exec, proxied to the kubelet;
- ``requests``, ``bodies``, ``protobuf``: parsing of requests;
- ``credentials``: token, certificates and kubeconfig.
"""
