"""Object detection: a backbone under torchvision's RetinaNet, on images in COCO's format."""
