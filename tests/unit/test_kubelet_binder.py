"""Which pods a cordoned node still gets."""

import pytest

from kubeai.local.kubelet.binder import TAINT, tolerates_cordon


@pytest.mark.parametrize(
    ("toleration", "tolerates"),
    [
        ({"key": TAINT, "operator": "Exists"}, True),
        ({"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": TAINT}, True),
        ({"key": TAINT, "operator": "Equal", "value": ""}, True),
        ({"operator": "Exists"}, True),
        ({"key": TAINT, "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": TAINT, "operator": "Equal", "value": "x"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, False),
        ({"operator": "Equal"}, False),
    ],
)
def test_a_toleration_matches_as_it_would_the_taint(toleration, tolerates):
    assert tolerates_cordon({"spec": {"tolerations": [toleration]}}) is tolerates


@pytest.mark.parametrize("spec", [{}, {"tolerations": None}, {"tolerations": []}])
def test_without_tolerations_a_cordon_holds(spec):
    assert not tolerates_cordon({"spec": spec})
