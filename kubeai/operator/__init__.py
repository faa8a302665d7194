"""The control plane: reconciles Models into pods, replica counts, status and routes.

The supervisor runs an `Operator` and implements `Loads` for it. See
docs/explain/life-of-a-model.md.
"""

from kubeai.operator.operator import Operator
from kubeai.operator.scaling.scaler import Loads

__all__ = ["Loads", "Operator"]
