"""Attacks on features of images that a client shows: what they give away of the images and of the labels.

An attack measures a lower bound: it shows what can be read from features with this attacker, this effort and this
data. One that fails shows that this attack fails, and nothing of a stronger one: a larger decoder, more images, a prior
over natural images, or several batches of one client. No attack proves privacy.

Modules: ``inversion`` (images from features), ``labels`` (labels from the classifier's input), ``similarity`` (how
alike two images are). All images are (N, C, H, W) with pixels in [0, 1].
"""
