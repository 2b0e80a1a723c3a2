"""The trainer where only the package is: accelerate launch -m stitchable.training --recipe digits key.path=value."""

from stitchable.training.train import main

if __name__ == "__main__":
    main()
