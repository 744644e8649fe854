"""Commands for weights on the Hugging Face Hub: publish, verify, mirror, import_official, manifest."""
