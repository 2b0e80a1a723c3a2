"""Training every stitch together: algorithm 1 of Stitchable Neural Networks (Pan et al., CVPR 2023).

The algorithm is `fit.fit`; it needs `pip install 'stitchable[training]'`. Its parts can be used alone:
`sampling.StitchSampler` draws, `losses.StitchLoss` compares with labels and a teacher, `optimization.parameter_groups`
sets the anchors' learning rate, `recipe.load_recipe` says what there is to set, and `train.run` goes through all stages
of a run. `trainer.StitchTrainer` is a Trainer of transformers that draws stitches.
"""
