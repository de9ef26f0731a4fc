"""A network, trained on images alone and then on noisy labels."""
