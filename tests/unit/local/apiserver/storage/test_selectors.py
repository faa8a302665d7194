"""Label and field selectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.storage import selectors


@pytest.mark.parametrize(
    "text", ["a in b", "a in (b", "=a", "a=b c", "a,,b", "a=b,", "!a=b", "a>x", "a in (b c)", "$"]
)
def test_bad_label_selectors_are_rejected(text: str):
    with pytest.raises(StatusError) as refused:
        selectors.labels(text)
    assert refused.value.code == 400


@given(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")), st.sampled_from("abc"),
       st.sampled_from("xyz"))  # fmt: skip
def test_opposite_selectors_partition_all_objects(found: dict[str, str], key: str, value: str):
    for one, other in (
        (f"{key}={value}", f"{key}!={value}"),
        (f"{key} in ({value})", f"{key} notin ({value})"),
        (key, f"!{key}"),
    ):
        assert selectors.labels(one)(found) is not selectors.labels(other)(found)


@given(st.text(max_size=30))
def test_arbitrary_selectors_do_not_crash(text: str):
    for read in (selectors.labels, lambda t: selectors.fields(t, ("metadata.name",))):
        try:
            read(text)
        except StatusError as error:
            assert error.code == 400  # noqa: PT017
