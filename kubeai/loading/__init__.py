"""``kubeai load URL DIR``: weights from a hub or a bucket into a folder, whole or not at all.

What a cache's Job and an adapter's loader run. :func:`load` lists what the URL holds, fetches it
into a staging folder (`staging`), checks it, and puts the folder in place by one rename; a load
that was killed goes on where it was. `hub` fetches by huggingface_hub, `buckets` by obstore; both
are imported only when a URL needs them (``pip install 'kubeai-gateway[load]'``).
"""

from kubeai.loading.load import load

__all__ = ["load"]
