"""Training: loop (`trainer`), tasks, checkpoints and pretrained weights."""
