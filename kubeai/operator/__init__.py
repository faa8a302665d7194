"""The control plane: what stands in the cluster becomes pods, replicas, status and routes.

`Operator` is what the supervisor runs; `Loads` is what it must offer. Life of a Model:
docs/life-of-a-model.md.
"""

from kubeai.operator.operator import Operator
from kubeai.operator.scaling import Loads

__all__ = ["Loads", "Operator"]
