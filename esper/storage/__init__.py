"""Storage: blobs in S3, named by the SHA-256 of their bytes."""
