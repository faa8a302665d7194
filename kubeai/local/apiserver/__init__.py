"""The embedded Kubernetes API: a generic object store that serves the Kubernetes API over HTTPS.

``kubeai local`` starts it as a separate process (``python -m kubeai.local.apiserver``). Its rooms,
from the bottom up:

- ``errors``: the errors that clients see (metav1.Status);
- ``schema``: schemas of objects and their CEL rules;
- ``kinds``: the served resources, with the defaults, validation and columns of the built-in ones;
- ``apply``: patches, field ownership and server-side apply;
- ``storage``: objects in memory and in SQLite (``store``), the rules of create, update and delete
  (``registry``), lists and watches (``watching``), and garbage collection (``collector``);
- ``http``: authentication and routing (``server``), requests, responses, discovery, and pod logs
  and exec (``kubelet_proxy``).

``credentials`` creates the token, the certificates and the kubeconfig.
"""
