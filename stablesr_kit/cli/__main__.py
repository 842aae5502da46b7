"""`python -m stablesr_kit.cli` is `stablesr`, for programs that start modules, such as `accelerate launch`."""

from stablesr_kit.cli import main

if __name__ == "__main__":
    main()
