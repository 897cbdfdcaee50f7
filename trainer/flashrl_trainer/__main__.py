"""`python -m flashrl_trainer`, which is what `torchrun -m flashrl_trainer` starts. Knows nothing but the way in."""

from flashrl_trainer.cli import main

if __name__ == "__main__":
    main()
