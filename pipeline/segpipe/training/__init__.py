"""From images and label masks to a model file: `segpipe train CONFIG`.

settings.py   the YAML of a training
dataset.py    images and masks in memory, and the split that keeps a field of view on one side
targets.py    label mask -> what the network is to give, and the weights of pixels
augment.py    a crop of an image and its targets, warped alike
batches.py    the crops of each step, a function of the seed and the step alone
losses.py     what is minimised
trainer.py    network, averaged weights and optimiser: one step, and their state
validation.py AP on whole images through the pipeline's own inference and decode; thresholds
run.py        the whole of it: resumes where it was stopped, writes the model file
report.py     curves and validation overlays as one page
"""
