"""Fine-tuning of ImageNet weights, static and converted, by a protocol that is written down before the runs."""
