"""Which pods are still bound to a cordoned node."""

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
def test_a_toleration_matches_the_cordon_taint(toleration, tolerates):
    assert tolerates_cordon({"spec": {"tolerations": [toleration]}}) is tolerates


@pytest.mark.parametrize("spec", [{}, {"tolerations": None}, {"tolerations": []}])
def test_a_pod_without_tolerations_does_not_tolerate_a_cordon(spec):
    assert not tolerates_cordon({"spec": spec})
