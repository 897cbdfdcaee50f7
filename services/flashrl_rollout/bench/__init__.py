"""`flashrl-rollout bench`: the service against the bare engine, and precisions against each other, in one run."""
