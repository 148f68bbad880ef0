"""The shipped blueprints, and the kernels of certified ones: built, uploaded to S3 and registered."""
