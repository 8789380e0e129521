"""Object detection: RetinaNet with a registered backbone, on images in the COCO format."""
