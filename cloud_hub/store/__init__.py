"""What the hub promises to keep: rows in SQL, tensors in blobs."""
