"""``kubeai load URL DIR``: download weights from a hub or bucket into a folder, all or nothing.

Run by cache Jobs and adapter loaders. :func:`load` lists the files of the URL, downloads them into
a staging folder (`staging`), verifies them, and puts the folder in place with a single rename. An
interrupted load resumes. `hub` uses huggingface_hub and `buckets` uses obstore; each is imported
only when a URL needs it (``pip install 'kubeai-gateway[load]'``).
"""

from kubeai.loading.load import load

__all__ = ["load"]
