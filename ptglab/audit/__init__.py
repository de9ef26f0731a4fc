"""One set of images from start to report."""
