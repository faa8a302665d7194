"""Teaches every process whose PYTHONPATH has this folder the broker of fakes/tcp_broker.py.

The product has no such hook: its table of brokers is extended when a process imports it.
"""

import importlib.abc
import importlib.util
import sys

URLS, CLIENT = "kubeai.brokers.urls", "kubeai.brokers.test"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == CLIENT:
            return importlib.util.spec_from_file_location(
                name, __file__.replace("broker_site/sitecustomize.py", "tcp_broker.py")
            )
        if name == URLS:
            sys.meta_path.remove(self)
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
            spec.loader = _Loader(spec.loader)
            return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.IMPLEMENTATIONS["test"] = module.Implementation("test", "Client", "asyncio", "test")


sys.meta_path.insert(0, _Finder())
