"""Images: readers, decoding, packs on disk, and batches for a model."""
