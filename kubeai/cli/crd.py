"""``kubeai crd``: the CustomResourceDefinition of Model."""


def crd() -> None:
    """Print the CustomResourceDefinition of Model, for kubectl apply."""
    from kubeai.api.crd import crd_yaml

    print(crd_yaml(), end="")
