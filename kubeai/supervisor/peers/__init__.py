"""The other replicas of KubeAI: their loads, and ours for them."""
