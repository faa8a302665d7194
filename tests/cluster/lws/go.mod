// The module with the CustomResourceDefinition of LeaderWorkerSet. Nothing of it is built.
module kubeai.org/tests/cluster/lws

go 1.26.0

require sigs.k8s.io/lws v0.7.0
