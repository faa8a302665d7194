"""Label selectors: they match as in Kubernetes, and bad ones are reported."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.api.labels import _TOKEN, REQUIREMENTS_MAX_COUNT, label_selector
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import SELECTORS_MAX_COUNT, parse_selectors

LABELS = {"env": "prod", "team/x.y": "a", "empty": "", "n": "5"}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("", True),
        ("env", True),
        ("!env", False),
        ("! gone", True),
        ("gone", False),
        ("env=prod", True),
        ("env == prod", True),
        ("env=dev", False),
        ("env!=dev", True),
        ("gone!=dev", True),
        ("gone=", False),
        ("empty=", True),
        ("empty", True),
        ("team/x.y=a,env in (dev, prod)", True),
        ("env in (dev)", False),
        ("env notin (dev,test)", True),
        ("env notin (prod)", False),
        ("gone notin (a)", True),
        ("gone in (a)", False),
        ("empty in (a,)", True),
        ("env,n>4,n<6", True),
        ("n>5", False),
        ("env>1", False),
        ("env=prod,n=6", False),
        ("in in (a)", False),
    ],
)
def test_selectors_match_as_in_kubernetes(selector, expected):
    assert label_selector(selector)(LABELS) is expected


@pytest.mark.parametrize(
    "selector",
    [
        ",", "a,", "a=b c", "=x", "a in b", "a in (b", "a in", "a=b=c", "!a=b", "a~b", "-a=b",
        "a=-b", "a/b/c=d", "UP/a=b", "x" * 64, "a=" + "x" * 64, "a>x", "a in (b c)", "(a)",
        "a=é", "!", ",".join(["a"] * 3000), "a-." * 80 + "/b", "a" * 4000,
    ],
)  # fmt: skip
def test_a_bad_selector_is_a_bad_request(selector):
    with pytest.raises(ErrorResponse) as caught:
        parse_selectors([selector])
    assert (caught.value.status, caught.value.param) == (400, "X-Label-Selector")


def test_a_selector_has_a_limited_number_of_requirements():
    requirements = ["a"] * REQUIREMENTS_MAX_COUNT
    assert label_selector(",".join(requirements))({"a": ""})
    with pytest.raises(ValueError, match="more than 64 requirements"):
        label_selector(",".join([*requirements, "a"]))


def test_a_request_has_a_limited_number_of_selectors():
    assert len(parse_selectors(["a"] * SELECTORS_MAX_COUNT)) == SELECTORS_MAX_COUNT
    with pytest.raises(ErrorResponse, match="more than 8 times"):
        parse_selectors(["a"] * (SELECTORS_MAX_COUNT + 1))


def test_white_space_is_skipped_in_linear_time():
    """In quadratic time, it takes minutes."""
    assert _TOKEN.findall("a" + "\xa0 " * 200_000 + "=") == ["a", "="]


@given(st.text(alphabet="ab=!,() innot><-/.é\0", max_size=20))
def test_any_selector_is_evaluated_or_rejected(selector):
    try:
        assert parse_selectors([selector])[0]({"a": "b"}) in (True, False)
    except ErrorResponse as error:
        assert error.status == 400  # noqa: PT017
