"""Make a stitchable model: anchors in, one checkpoint with every stitch trained and measured out.

    accelerate launch training/train.py --recipe training/recipes/digits.yaml key.path=value ... [--resume]

What it does is in src/stitchable/training/: the stages of a run in `train.py`, algorithm 1 in `fit.py`.
"""

from stitchable.training.train import main

if __name__ == "__main__":
    main()
