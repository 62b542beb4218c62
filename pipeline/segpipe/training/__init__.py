"""From images and label masks to a model file: `segpipe train CONFIG`.

settings.py   the YAML of a training
dataset.py    images and masks in memory, and the split that keeps a field of view on one side
targets.py    label mask -> what the network is to give
weights.py    label mask -> how much each pixel counts
augment.py    a crop of an image and its targets, warped alike
batches.py    the crops of each step, a function of the seed and the step alone
batch_targets.py, loss_terms.py, losses.py, named_losses.py   what is minimised
trainer.py    network, averaged weights and optimiser: one step, and their state
validation.py whole images through the pipeline's own inference, and what judges them:
judging_objects.py, judging_classes.py   AP and thresholds; IoU
history.py, course.py   a training under way: steps, validations, checkpoints, what it leaves
run.py        the whole of it, from settings that fit to a model file
report.py     curves and validation overlays as one page
"""
