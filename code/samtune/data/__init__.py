"""From image and mask files to batches."""
