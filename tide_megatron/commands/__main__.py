"""`python -m tide_megatron.commands`, for `torchrun -m` and where the console script is not on the path."""

from tide_megatron.commands import main

if __name__ == "__main__":
    main()
