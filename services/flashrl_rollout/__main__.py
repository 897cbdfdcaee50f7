"""`python -m flashrl_rollout`: the same as `flashrl-rollout`. Knows nothing else."""

from flashrl_rollout.cli import main

if __name__ == "__main__":  # engine processes are spawned and import this module again
    main()
