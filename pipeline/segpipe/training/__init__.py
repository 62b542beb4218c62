"""From folders of images and label masks to a model file."""
