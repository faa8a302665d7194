"""Request bodies in protobuf."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.http import protobuf


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def _sent(kind: str, raw: bytes) -> bytes:
    meta = _field(1, b"v1") + _field(2, kind.encode())
    return b"k8s\x00" + _field(1, meta) + _field(2, raw)


def test_protobuf_decodes_to_the_same_object_as_json():
    metadata = _field(1, b"s") + _field(2, b"") + _field(8, b"")
    entry = _field(1, b"token") + _field(2, b"abc")
    raw = _field(1, metadata) + _field(2, entry) + _field(3, b"Opaque")
    assert protobuf.decode(_sent("Secret", raw)) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "data": {"token": "YWJj"},
        "type": "Opaque",
    }


@given(st.binary(max_size=60), st.sampled_from(["Secret", "Pod", "Nothing"]))
def test_broken_protobuf_is_a_bad_request(raw: bytes, kind: str):
    for body in (raw, _sent(kind, raw)):
        try:
            protobuf.decode(body)
        except StatusError as error:
            assert error.code == 400  # noqa: PT017
