"""The operators on a CPU, and on every device without a faster implementation."""
