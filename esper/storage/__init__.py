"""Storage: blobs in S3, named by their SHA-256."""
